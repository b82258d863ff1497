#!/bin/sh
# Locks the images' dependencies, with hashes; traces are among them. Run from the repository's root: make lock
set -eu
uv=${UV:-uv}
echo 'setuptools>=77' >build/setuptools.in # builds the package in the image
for image in coordinator:deploy/coordinator/pyproject.toml worker:pyproject.toml; do
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --custom-compile-command 'make lock' --no-annotate --extra otel "$@" \
        --output-file "deploy/requirements/${image%%:*}.txt" "${image#*:}" build/setuptools.in
done
