"""The backend `splash_interpret`: the TPU kernel's program run on any platform, for tests."""

from functools import partial

from kernels.backends import splash

attend = partial(splash.attend, interpret=True)
