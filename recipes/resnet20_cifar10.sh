#!/usr/bin/env bash
# CIFAR-10 ResNet-20 as it comes, no training: convert for each T, evaluate on the 10,000 test images.
#
#   recipes/resnet20_cifar10.sh MODEL.py:FACTORY WEIGHTS CIFAR10.npz [OUT]
#
# MODEL.py:FACTORY builds the network (16/32/64 channels, input normalised by the ImageNet mean and deviation), WEIGHTS
# is its state dict, CIFAR10.npz holds train_images, train_labels, test_images, test_labels as uint8.
# Calibration: the first 1,000 training images. A run that was stopped goes on where it stopped. About 35 minutes on two
# CPU cores; METHODS="..." runs some methods only.
set -euo pipefail
model=$1 weights=$2 data=npz:$3 out=${4:-runs/resnet20_cifar10}
quickspike=${QUICKSPIKE:-.venv/bin/quickspike}
statistics=(--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225)
mkdir -p "$out"
for method in ${METHODS:-threshold_balancing potential_init signed}; do
    for steps in 1 2 4 8 16 32; do
        [ ! -f "$out/$method-$steps.json" ] || continue
        network=$out/$method-$steps.safetensors
        options=()
        # Chosen on training images 2000 to 2599, which calibrate nothing: 1 is better at T = 4, 0.85 at T = 8 and 32; T = 16 follows.
        [ "$method" != threshold_balancing ] || [ "$steps" -lt 8 ] || options=(--scale 0.85)
        # Neurons that take spikes back, with the defaults of threshold_balancing.
        [ "$method" != signed ] || options=(--signed)
        "$quickspike" convert "$model" --weights "$weights" --data "$data" "${statistics[@]}" \
            --method "${method/signed/threshold_balancing}" --steps "$steps" "${options[@]}" --calibration-images 1000 --out "$network"
        reference=()
        [ "$steps" != 1 ] || reference=(--reference "$model" --weights "$weights")
        "$quickspike" evaluate "$network" --data "$data" --steps "$steps" "${reference[@]}" \
            --out "$out/$method-$steps.json" --json >/dev/null
        echo "$method T=$steps: $(grep -A1 '"accuracy"' "$out/$method-$steps.json" | tail -1)"
    done
done
"$(dirname "$quickspike")/python" "$(dirname "$0")/table.py" "$out"
