#!/bin/sh
# Writes k8s/base and the overlays anew: make k8s. A test compares them with what is committed.
# The argument is the folder that they are written to.
set -eu
to=$1

# The base: plain Kubernetes, three pods without GPUs, Prometheus by annotations.
switokd k8s render digits-2t1s --name switokd --image switokd:latest --no-prometheus-operator \
  --output "$to/base"

# A short run of two small networks, for a cluster on a laptop.
switokd k8s render digits-1t1s --name switokd --image switokd:latest --no-prometheus-operator \
  --runs-size 1Gi --output "$to/overlays/cpu-demo" schedule.epochs=2 checkpoint.every_steps=10

# One NVIDIA GPU for each rank.
switokd k8s render digits-2t1s --name switokd --image switokd:latest --no-prometheus-operator \
  --gpus-per-pod 1 --output "$to/overlays/gpu"

# TLS and tokens, and the Prometheus Operator.
switokd k8s render digits-2t1s --name switokd --image switokd:latest --tls \
  --output "$to/overlays/tls"
