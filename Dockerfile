# docker build -t megaprune .
# docker run --gpus all --ipc=host -it megaprune
#
# The vendor's image brings torch and Transformer Engine built for its CUDA; both stay as they are.
ARG BASE=nvcr.io/nvidia/pytorch:26.01-py3
FROM ${BASE}

WORKDIR /opt/megaprune
COPY . .

# Held: what the image was built with, and our Megatron-Core. Had pip replaced one of the image's, the
# last line would fail.
RUN vendor() { pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|transformer[-_]engine|flash[-_]attn)[a-z_-]*==' | sort; } \
 && vendor > /tmp/vendor.txt \
 && grep -E '^megatron-core==' constraints.txt > /tmp/megatron.txt \
 && pip install --no-cache-dir -c /tmp/vendor.txt -c /tmp/megatron.txt -e . \
 && vendor | diff /tmp/vendor.txt -
