"""The configurations as a package: `from mefn_jax.configs import default`, in a checkout and in an installed package.

In a checkout this module stands for the folder `configs/` beside the package. A wheel has the files of that folder here
in its place.
"""

from mefn_jax.runtime.config_files import find_config_folder

__path__ = [str(find_config_folder())]
