#!/usr/bin/env bash
# Everything that needs a GPU, with nothing but python3 with PyTorch and pytest: kernels against the reference, PyTorch jobs and
# other clients through the shim, and speed beside plain NCCL of the same run. What it runs comes from scripts/pack_gpu.sh. The
# parts are in scripts/gpu/pytest.ini, the checks in scripts/gpu/test_*.py.
#
#   ./scripts/test_gpu.sh [PART...] [OPTION...]     default: all parts; options are pytest's, as in -k soak
#   ./scripts/test_gpu.sh --list [PART...]          the checks of these, and how many a part has
#
# OUT (.gpu/results)            gets junit.xml, run.json, the logs of all jobs and what was measured
# FLASHCOMM_REQUIRE_GPU (1)     0: without a GPU the checks are skipped, not failed
# FLASHCOMM_TEST_BUDGET_S       seconds that all of it may take: what is not done then fails, and the report comes in time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-.gpu/results} FLASHCOMM_REQUIRE_GPU=${FLASHCOMM_REQUIRE_GPU:-1} PYTHONDONTWRITEBYTECODE=1
pytest=(python3 -m pytest -c scripts/gpu/pytest.ini -p no:cacheprovider)

list=false
if [[ ${1:-} == --list ]]; then list=true && shift; fi
parts=""
while (($#)) && [[ $1 != -* ]]; do parts+="${parts:+ or }$1" && shift; done
select=(${parts:+-m "$parts"} "$@" scripts/gpu)
if $list; then exec "${pytest[@]}" --collect-only -q "${select[@]}"; fi
[[ -f .gpu/libflashcomm.so ]] || { echo "run ./scripts/pack_gpu.sh first, where cargo is, and bring .gpu/ along" >&2; exit 1; }
find .gpu -maxdepth 1 -type f ! -name '*.*' -exec chmod +x {} +
exec "${pytest[@]}" -v -rsfE --junitxml="$OUT/junit.xml" "${select[@]}"
