# docker build -t megaprune .
# docker run --gpus all --ipc=host -it megaprune
#
# NVIDIA's image contains torch and Transformer Engine, built for its CUDA. Both are kept.
ARG BASE=nvcr.io/nvidia/pytorch:26.01-py3
FROM ${BASE}

WORKDIR /opt/megaprune
COPY . .

# The constraints are the image's own packages and the tested Megatron-Core. The last line fails if pip replaced one of
# the image's packages. Its triton may have another name than the package on PyPI, so it is not asked for.
RUN vendor() { pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|transformer[-_]engine|flash[-_]attn)[a-z_-]*==' | sort; } \
 && vendor > /tmp/vendor.txt \
 && grep -E '^megatron-core==' constraints.txt > /tmp/megatron.txt \
 && sed -i '/"triton>=/d' pyproject.toml \
 && pip install --no-cache-dir -c /tmp/vendor.txt -c /tmp/megatron.txt -e . \
 && vendor | diff /tmp/vendor.txt -
