"""Fused kernels that the core imports, and the project's configurations do not use."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
