#!/usr/bin/env bash
# CIFAR-10 ResNet-20 as it comes, no training: convert for each T, evaluate on the 10,000 test images.
#
#   recipes/resnet20_cifar10.sh MODEL.py:FACTORY WEIGHTS CIFAR10.npz [OUT]
#
# MODEL.py:FACTORY builds the network (16/32/64 channels, input normalised by the ImageNet mean and deviation), WEIGHTS
# is its state dict, CIFAR10.npz holds train_images, train_labels, test_images, test_labels as uint8.
# Calibration: the first 1,000 training images. A run that was stopped goes on where it stopped. The first three take about
# 35 minutes on two CPU cores; METHODS="..." runs some only, STEPS="..." other T; groups4_weights, groups8_weights .. run where METHODS names them.
set -euo pipefail
model=$1 weights=$2 data=npz:$3 out=${4:-runs/resnet20_cifar10}
quickspike=${QUICKSPIKE:-.venv/bin/quickspike}
statistics=(--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225)
mkdir -p "$out"

# What `convert` is given for a column's method. *_leaky: the readout forgets early steps;
# streaming: plain integrate-and-fire; signed: neurons take spikes back; synchronous: layers wait for
# whole windows; weighted: likewise, and the spike of step t counts 2^(T-t) times as much as the last; groups*: that many neurons in place of one.
options_of() { # METHOD STEPS
    # The factor was chosen on training images 2000 to 2599, which calibrate nothing: 1 is better at T = 4, 0.85 at T = 8 and 32; T = 16 follows.
    local scale=1
    [ "$2" -lt 8 ] || scale=0.85
    case $1 in
    potential_init) echo --method potential_init ;;
    threshold_balancing) echo --method threshold_balancing --scale $scale ;;
    streaming_bias) echo --method threshold_balancing --scale $scale --refine bias_correction ;;
    streaming_weights)
        # The longest windows take the longest; 1,000 steps at T = 16 are an hour on one core.
        local iterations=200
        [ "$2" -lt 16 ] || iterations=1000
        echo --method threshold_balancing --scale $scale --refine "weight_calibration:reach=network,iterations=$iterations"
        ;;
    streaming_bias_leaky) echo --method threshold_balancing --scale $scale --refine bias_correction leaky_readout ;;
    streaming_weights_leaky) echo --method threshold_balancing --scale $scale --refine weight_calibration:reach=network leaky_readout ;;
    residual_mask) echo --method threshold_balancing --scale $scale --refine "residual_mask:tau=$((($2 + 1) / 2))" ;;
    signed) echo --method threshold_balancing --signed ;;
    signed_bias) echo --method threshold_balancing --signed --refine bias_correction ;;
    synchronous) echo --method threshold_balancing --synchronous ;;
    synchronous_bias) echo --method threshold_balancing --synchronous --refine bias_correction ;;
    synchronous_weights)
        # Chosen on the last 2,000 training images at T = 8: 98.60 % with 0.001, 98.70 with 0.0001; T = 16 follows.
        local rate=0.001
        [ "$2" -lt 8 ] || rate=0.0001
        echo --method threshold_balancing --synchronous --refine "weight_calibration:reach=network,learning_rate=$rate"
        ;;
    # 2^T levels in T steps; more than 8 of these change nothing that 10,000 images show.
    weighted) echo --method threshold_balancing --weighted ;;
    weighted_bias) echo --method threshold_balancing --weighted --refine bias_correction ;;
    # Groups of M neurons: M + 1 levels in one step. As with synchronous layers of M steps, from 8 levels on the lower rate.
    groups*_weights)
        local members=${1#groups} slow=0.001
        members=${members%_weights}
        [ $((members * $2)) -lt 8 ] || slow=0.0001
        echo --method threshold_balancing --members "$members" --refine "weight_calibration:reach=network,learning_rate=$slow"
        ;;
    offset_shift) echo --method threshold_balancing --refine offset_shift bias_correction ;;
    *) echo "no such column: $1" >&2 && return 2 ;;
    esac
}

for method in ${METHODS:-threshold_balancing potential_init signed streaming_bias streaming_weights signed_bias synchronous synchronous_bias synchronous_weights weighted weighted_bias offset_shift}; do
    for steps in ${STEPS:-1 2 4 8 16 32}; do
        [ ! -f "$out/$method-$steps.json" ] || continue
        [[ $method != weighted* ]] || [ "$steps" -le 8 ] || continue
        network=$out/$method-$steps.safetensors
        chosen=$(options_of "$method" "$steps")
        # shellcheck disable=SC2086 # several words
        "$quickspike" convert "$model" --weights "$weights" --data "$data" "${statistics[@]}" \
            --steps "$steps" $chosen --calibration-images 1000 --out "$network"
        reference=()
        [ "$steps" != 1 ] || reference=(--reference "$model" --weights "$weights")
        "$quickspike" evaluate "$network" --data "$data" --steps "$steps" "${reference[@]}" \
            --out "$out/$method-$steps.json" --json >/dev/null
        echo "$method T=$steps: $(grep -A1 '"accuracy"' "$out/$method-$steps.json" | tail -1)"
    done
done
"$(dirname "$quickspike")/python" "$(dirname "$0")/table.py" "$out"
