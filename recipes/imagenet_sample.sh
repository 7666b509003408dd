#!/usr/bin/env bash
# ImageNet, SqueezeNet v1.0 and MobileNet v1 0.75 as they come, no training: top-1 on 500 validation images at many T.
#
#   recipes/imagenet_sample.sh NETWORKS.py SQUEEZENET_WEIGHTS MOBILENET_WEIGHTS IMAGENET_SAMPLE.npz [OUT]
#
# NETWORKS.py holds the factories squeezenet_v10_imagenet and mobilenet_v1_075_imagenet. IMAGENET_SAMPLE.npz holds 1,000
# training images of 224 x 224 pixels, one per class, which calibrate, and 500 validation images. The source networks have
# 57.0 and 64.8 %. Per network: streaming and synchronous, with 8-bit weights (engines `integer` and `count`), and with signed neurons;
# MODES=weighted STEPS="4 5 6 8" for spikes weighted by their step (T up to 8).
# OUT gets a folder for each network with a report MODE-T.json each and table.md. A run that was stopped goes on where it
# stopped. MODES="..." and STEPS="..." run some only; CALIBRATION=N and IMAGES=N take fewer images, for a try;
# REFINE="bias_correction:images=96,batch=4,rate=0.5" refines every network for its T (files MODE_refined-T.json, or of another LABEL);
# INITIAL=0.6 is the potential that neurons start from, in thetas; with SHARE=64 conversions for more steps are those for so many;
# FLOAT=1 leaves weights in floating point;
# NETWORKS=squeezenet runs one of the two;
# HELD_OUT=4 chooses: agreement with the source network on every fourth calibration image, which then calibrates nothing.
set -euo pipefail
networks=$1 squeezenet=$2 mobilenet=$3 data=npz:$4 out=${5:-results/imagenet_sample}
python=${PYTHON:-.venv/bin/python}
here=$(dirname "$0")
# From T = 32 on the ceilings for 32 steps serve, and one simulation of the longest T tells all of them.
common=(--steps ${STEPS:-8 16 32 64 128} --share "${SHARE:-32}" --calibration-images "${CALIBRATION:-1000}")
[ -z "${IMAGES:-}" ] || common+=(--images "$IMAGES")
[ -z "${REFINE:-}" ] || common+=(--refine $REFINE --label "${LABEL:-refined}")
[ -z "${INITIAL:-}" ] || common+=(--initial "$INITIAL")
[ -z "${FLOAT:-}" ] || common+=(--float)
[ -z "${HELD_OUT:-}" ] || common+=(--held-out "$HELD_OUT")

run() { # NAME FACTORY WEIGHTS preprocessing...
    [[ " ${NETWORKS:-squeezenet mobilenet} " == *" $1 "* ]] || return 0
    local folder=$out/$1 factory=$2 weights=$3
    shift 3
    "$python" "$here/../bench/many_steps.py" "$networks:$factory" "$weights" "$data" "$@" "${common[@]}" --out "$folder"
    [ -n "${HELD_OUT:-}" ] || { "$python" "$here/table.py" "$folder" && cat "$folder/table.md"; }
}

# Caffe's input: 227 x 227 pixels in 0..255, blue first, less (104, 117, 123).
# The factors behind the modes scale the ceilings. Chosen at T = 32, synchronous, by agreement with the source network on 100
# held-out calibration images (300 calibrated): 73 % at 1, 77 % at 0.9, 74 % at 0.8; the other modes follow.
run squeezenet squeezenet_v10_imagenet "$squeezenet" --modes ${MODES:-synchronous:0.9 signed:0.9 streaming:0.9} --resize 227 --bgr \
    --mean 0.4078431 0.4588235 0.4823529 --std 0.003921569 0.003921569 0.003921569
# TensorFlow's: pixels / 127.5 - 1. Likewise, with 50 images that calibrate: 83 % at 1, 69 % at 0.9, 6 % at 0.8.
run mobilenet mobilenet_v1_075_imagenet "$mobilenet" --modes ${MODES:-synchronous signed streaming} --mean 0.5 --std 0.5
