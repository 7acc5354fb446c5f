"""Make a virtual environment with everything that `make` needs. Standard library only; runs on any Python 3.

Debian and Ubuntu ship Python without ensurepip until python3-venv is installed. Then the environment is made
without pip, and the wheel of pip in Debian's own package python3-pip-whl installs itself: that takes no root
rights, and nothing outside the environment changes.
"""

import argparse
import glob
import os
import platform
import subprocess
import sys
import tempfile

OLDEST = (3, 10)
VENV_HINT = "apt-get install python3-venv, then run the command again"


class SetupError(Exception):
    """What failed, and a hint."""


def main():
    """Build or complete the environment; return 0, or 1 after one message."""
    parser = argparse.ArgumentParser(description="Make a virtual environment for dijiang-export.")
    parser.add_argument("--venv", default=".venv", help="where (default: .venv)")
    parser.add_argument("--extras", default="export,cpu,serve,dev", help="extras of the package to install")
    parser.add_argument("--torch-index", default="", help="an extra package index to find PyTorch in")
    options = parser.parse_args()
    try:
        make(options.venv)
        install(options.venv, options.extras, options.torch_index)
    except SetupError as error:
        what, hint = error.args
        print(f"error: {what}\nhint: {hint}", file=sys.stderr)
        return 1
    return 0


def make(venv):
    """Make the environment with pip in it, unless it is there already."""
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:2]))
        needed = ".".join(map(str, OLDEST))
        raise SetupError(
            f"Python {needed} or newer is needed; {sys.executable} is {found}",
            f"install a newer one and name it: make PYTHON=python{needed} ...",
        )
    python = os.path.join(venv, "bin", "python")
    if os.path.exists(python) and run(python, "-m", "pip", "--version", quiet=True):
        return
    print(f"Making a virtual environment in {venv}", flush=True)
    if run(sys.executable, "-c", "import ensurepip", quiet=True):
        if not run(sys.executable, "-m", "venv", "--clear", venv):
            raise SetupError("the virtual environment could not be made", VENV_HINT)
    elif not run(sys.executable, "-m", "venv", "--clear", "--without-pip", venv):
        raise SetupError("this Python cannot make virtual environments", VENV_HINT)
    else:
        with tempfile.TemporaryDirectory() as folder:
            wheel = find_pip_wheel(folder)
            if not run(python, f"{wheel}/pip", "install", "--quiet", "--no-index", wheel):
                raise SetupError("pip could not be installed from its wheel", VENV_HINT)


def find_pip_wheel(folder):
    """Path of a wheel of pip: the system's, or one unpacked into `folder` from Debian's package of it."""
    wheels = glob.glob("/usr/share/python-wheels/pip-*.whl")
    if not wheels:
        try:
            if not fetch_pip_package(folder) and os.geteuid() == 0:  # a new container has no package lists
                run("apt-get", "update", quiet=True)
                fetch_pip_package(folder)
        except OSError:  # no apt here
            pass
        wheels = glob.glob(os.path.join(folder, "usr/share/python-wheels/pip-*.whl"))
    if not wheels:
        raise SetupError("this Python has neither pip nor ensurepip", VENV_HINT)
    return wheels[0]


def fetch_pip_package(folder):
    """Download and unpack python3-pip-whl into `folder`; whether that worked."""
    if not run("apt-get", "download", "python3-pip-whl", quiet=True, cwd=folder):
        return False
    packages = glob.glob(os.path.join(folder, "python3-pip-whl_*.deb"))
    return bool(packages) and run("dpkg-deb", "--extract", packages[0], folder)


def install(venv, extras, torch_index):
    """Install the package, editable, with what `extras` need, in the versions of constraints.txt."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not torch_index and platform.system() == "Linux" and platform.machine() == "x86_64":
        print(
            "PyTorch comes from the default package index: on Linux that may be the CUDA build (gigabytes).\n"
            "For the CPU build: make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...",
            flush=True,
        )
    pip = [os.path.join(venv, "bin", "python"), "-m", "pip", "install"]
    pip += [] if sys.stdout.isatty() else ["--quiet"]
    pip += ["--disable-pip-version-check", "--constraint", os.path.join(root, "constraints.txt")]
    if torch_index:
        pip += ["--extra-index-url", torch_index]
    # The build backend first, also from the constraints: an isolated build would take the newest.
    package = f"{root}[{extras}]"
    for arguments in (["hatchling"], ["--no-build-isolation", "--editable", package]):
        print("Installing", arguments[-1], "and what it needs", flush=True)
        if not run(*pip, *arguments):
            raise SetupError("pip could not install what is needed", "its message is above")


def run(*command, quiet=False, cwd=None):
    """Run `command`; whether it succeeded."""
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.call(command, stdout=sink, stderr=sink, cwd=cwd) == 0


if __name__ == "__main__":
    sys.exit(main())
