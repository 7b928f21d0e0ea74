#!/usr/bin/env bash
# wheel.sh MATURIN...: builds the Python wheel with this command (such as `python3 -m maturin`), installs it into a fresh virtual environment
# without network, and runs the quickstart from there. MOEWARDEN_WHEEL_PROFILE: the cargo profile (default: dev, which shares the
# artifacts of the tests). MOEWARDEN_WHEEL_OPTIONS: more options of the build; with a feature that links libraries of this machine
# (mpi) the wheel is for this machine only.
set -euo pipefail
maturin=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

read -ra options <<<"${MOEWARDEN_WHEEL_OPTIONS:-}"
((${#options[@]} == 0)) || options+=(--auditwheel skip)
"${maturin[@]}" build --quiet --profile "${MOEWARDEN_WHEEL_PROFILE:-dev}" --out "$work/wheels" "${options[@]}"
wheels=("$work"/wheels/moewarden-*.whl)
((${#wheels[@]} == 1)) || { echo "wheel.sh: not one wheel, but ${wheels[*]}" >&2; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-index --disable-pip-version-check "${wheels[0]}"

# Neither the source folder nor cargo's binary may be what runs.
cd "$work"
export PATH="$work/venv/bin:$PATH"
[[ $(command -v moewarden) == "$work/venv/bin/moewarden" ]]
moewarden --version
moewarden quickstart | tee quickstart.txt
grep -q "6 of 6" quickstart.txt
test -s moewarden-quickstart/quickstart.html
"$work/venv/bin/python" -m pip uninstall --quiet --yes moewarden
[[ ! -e $work/venv/bin/moewarden ]] || { echo "wheel.sh: pip left the binary behind" >&2; exit 1; }
echo "wheel.sh: ${wheels[0]##*/} installs, runs the quickstart, and uninstalls"
