#!/bin/sh
# Tried here: run with Python 3.13, and the folder run by AWS's own runtime client. Not tried: an upload.
# Makes build/, which template.yaml deploys, and receiver.zip of it, from requirements.txt and my_handlers.py of this folder.
set -eu
VERSION=${VERSION:-3.13} # Runtime in template.yaml
ARCH=${ARCH:-x86_64}     # or aarch64, for Architectures: [arm64]
PYTHON=${PYTHON:-python$VERSION}
HANDLERS=${HANDLERS:-my_handlers.py} # files and folders, by blank

"$PYTHON" -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$VERSION'.split('.'))))" ||
  { echo "$PYTHON is not Python $VERSION, whose bytecode the function needs" >&2; exit 1; }
rm -rf build receiver.zip
"$PYTHON" -m pip install --quiet --no-compile --target build --only-binary :all: --python-version "$VERSION" \
  --platform "manylinux_2_34_$ARCH" --platform "manylinux_2_28_$ARCH" --platform "manylinux_2_27_$ARCH" \
  --platform "manylinux_2_17_$ARCH" --platform "manylinux2014_$ARCH" -r requirements.txt
rm -rf build/bin
# shellcheck disable=SC2086 # names without blanks
cp -R $HANDLERS build/
cp run.sh build/
# A function's disk cannot be written, and a zip rounds times: bytecode that is checked by neither.
"$PYTHON" -m compileall -q --invalidation-mode unchecked-hash -s build build
(cd build && "$PYTHON" -m zipfile -c ../receiver.zip .)
du -sh build receiver.zip
