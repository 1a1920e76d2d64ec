#!/usr/bin/env bash
# What compressed all-reduces cost the accuracy of real models, on one GPU, with nothing but python3 with PyTorch and
# transformers: a Llama trained here and now on real text, and all-MiniLM-L6-v2, tensor-parallel through the shim.
#
#   ./scripts/eval_accuracy.sh --pack         where there is a network: text and weights into .gpu/eval/
#   ./scripts/eval_accuracy.sh [OPTION...]    on the GPU machine, with .gpu/eval/ and .gpu/libflashcomm.so brought along
#
#   --train-only              nothing but the training
#   --seconds-train N         for all of the training (200)
#   --seconds N               begin no job later than that after the training (160)
#   --worlds LIST             ranks that the default code is measured with, at all widths (2,4,8)
#   --codes LIST              further codes, after the default one; '' for none
#   --code-worlds LIST        ranks that these are measured with (4)
#   --code-widths LIST        and at what widths (4,3,6)
#   --model FOLDER            where the trained model is, or goes (/tmp/flashcomm-eval-model)
#   --tiny                    tries everything out on the CPU, over gloo, without the shim
#
# OUT (default .gpu/results) gets eval.json, whole after every job: scripts/gpu/eval_plot.py draws it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pack=false train_only=false tiny=false
seconds_train=200 seconds=160 model=/tmp/flashcomm-eval-model
worlds=2,4,8 widths=8,7,6,5,4,3,2,4:8 codes=plain code_worlds=4 code_widths=4,3,6
while (($#)); do
    case $1 in
        --pack) pack=true ;;
        --train-only) train_only=true ;;
        --tiny) tiny=true ;;
        --seconds-train | --seconds | --worlds | --widths | --codes | --code-worlds | --code-widths | --model)
            [[ $# -gt 1 ]] || { echo "$1 wants a value" >&2; exit 2; }
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift
            ;;
        *)
            echo "unknown argument '$1'; the head of $0 says what there is" >&2
            exit 2
            ;;
    esac
    shift
done

if $pack; then
    python=.toolkit/eval/bin/python
    if ! $python -c 'import numpy, safetensors, tokenizers' 2>/dev/null; then
        python3 -m venv .toolkit/eval
        $python -m pip install --quiet --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 tokenizers==0.23.3
    fi
    # Kept beside, for pack_gpu.sh empties .gpu/.
    if [[ scripts/gpu/eval_data.py -nt .toolkit/eval-data/manifest.json ]]; then
        $python scripts/gpu/eval_data.py .toolkit/eval-data
    fi
    mkdir -p .gpu
    rm -rf .gpu/eval
    cp -r .toolkit/eval-data .gpu/eval
    du -sh .gpu/eval
    exit
fi

if [[ ! -f .gpu/eval/manifest.json ]]; then
    echo "run $0 --pack first, where there is a network, and bring .gpu/eval/ along" >&2
    exit 1
fi
out=${OUT:-.gpu/results}
mkdir -p "$out"
train=() job=()
if $tiny; then
    train=(--device cpu --layers 2 --hidden 256 --inner 256 --heads 8 --kv-heads 8 --length 64 --batch 4 --sequences 4)
    job=(--device cpu --sequences 4 --batch 2 --seconds 500)
else
    if ! $train_only && [[ ! -f .gpu/libflashcomm.so ]]; then
        echo "run ./scripts/pack_gpu.sh first, where cargo is, and bring .gpu/libflashcomm.so along" >&2
        exit 1
    fi
    job=(--seconds 70)
fi
failed=()

if [[ ! -f $model/model.safetensors ]]; then
    timeout -k 5 $((seconds_train + 20)) \
        python3 scripts/gpu/eval_train.py --out "$model" --seconds "$seconds_train" ${train[@]+"${train[@]}"}
fi
cp "$model/train.json" "$out/train.json" 2>/dev/null || true
if $train_only; then exit; fi

if ! $tiny; then
    # Ranks share the GPU: without MPS they would take turns on it.
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mpslog
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    nvidia-cuda-mps-control -d || true # it may run already, after a call that was cut off
    trap 'echo quit | nvidia-cuda-mps-control' EXIT
fi

begin=$SECONDS
# evaluate WORLD CODE WIDTHS [OPTION...]: one job; a failure is remembered, and the next job goes on.
evaluate() {
    local world=$1 code=$2 name="$1 ranks, $2" status=0
    if ((SECONDS - begin > seconds)); then
        echo "left out, no time: $name" >&2
        failed+=("$name (no time)")
        return
    fi
    timeout -k 5 "$($tiny && echo 600 || echo 80)" python3 scripts/gpu/eval_model.py --ranks "$world" --code "$code" \
        --widths "$3" --model "$model" --json "$out/eval.json" "${job[@]}" "${@:4}" || status=$?
    ((status == 0)) || failed+=("$name")
}

rm -f "$out/eval.json"
for world in ${worlds//,/ }; do evaluate "$world" default "$widths" --references; done
for code in ${codes//,/ }; do
    for world in ${code_worlds//,/ }; do evaluate "$world" "$code" "$code_widths"; done
done

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all evaluated in $((SECONDS - begin)) s: $out/eval.json"
