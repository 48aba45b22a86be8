"""A figure that a notebook shows."""

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A Matplotlib figure that a notebook shows by itself, where pyplot is not imported too."""

    def _repr_png_(self) -> bytes:
        """What IPython asks for."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=120)
        return file.getvalue()
