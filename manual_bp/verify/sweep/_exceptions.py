"""What the sweep leaves out, and what it knows to be wrong in PyTorch, each with the reason."""

_SPARSE = "sparse tensors, which the kit does not judge"
_LAZY = "has no parameters before its first call; then it is the module without Lazy"

_LARGE = "its samples are large; those of our own are taken"

# Left out until the kit can judge them.
SKIPPED = {
    "sparse.sampled_addmm": _SPARSE,
    "sparse.mm/reduce": _SPARSE,
    "to_sparse": _SPARSE,
    "chalf": "PyTorch has almost no kernels for complex32, not even nan_to_num",
    "bmm": _LARGE,
    "grid_sampler_2d": _LARGE,
    "nn.functional.ctc_loss": _LARGE,
    "nn.functional.dropout3d": _LARGE,
    "nn.functional.feature_alpha_dropout/with_train": _LARGE,
    "slice_scatter": _LARGE,
    "to": "its samples are large, and it only changes the dtype",
    "as_strided/partial_views": "reads memory outside its argument, which a copy does not have",
    "normal": "random, and PyTorch defines its gradient as zero",
    "normal/number_mean": "random, and PyTorch defines its gradient as zero",
    "nn.functional.max_unpool1d": "indices occur twice in the samples; the variant /grad is judged",
    "nn.functional.max_unpool2d": "indices occur twice in the samples; the variant /grad is judged",
    "nn.functional.max_unpool3d": "indices occur twice in the samples; the variant /grad is judged",
    **{
        f"nn.Lazy{kind}{dimensions}d": _LAZY
        for kind in ("Conv", "ConvTranspose")
        for dimensions in (1, 2, 3)
    },
}

# The sample dimension is not given for these.
UNBATCHED = {
    "lu_unpack": "PyTorch 2.13 crashes on an empty batch",
    "native_batch_norm": "PyTorch 2.13 crashes on an empty batch",
    "nn.functional.pdist": "PyTorch 2.13 crashes on an empty batch",
}

_FLOOR = "near 0 the quotient jumps more often than a step of the differences is long"
_POOLS = "which elements it pools depends on the dtype in which it draws random numbers"
_RANK = "of a matrix without full rank, the result is not defined"

# Checks that fail because PyTorch is wrong, or because the function makes no such promise.
KNOWN = {
    **{
        name: {"finite_differences": _FLOOR}
        for name in (
            "__rmod__",
            "div/floor_rounding",
            "div/trunc_rounding",
            "fmod",
            "remainder",
        )
    },
    **{
        f"nn.functional.fractional_max_pool{dimensions}d": dict.fromkeys(
            ("float32", "bfloat16", "float16"), _POOLS
        )
        for dimensions in (2, 3)
    },
    "linalg.lstsq": {"at_zero": _RANK},
    "linalg.lstsq/grad_oriented": {"at_zero": _RANK},
    "linalg.solve_ex": {"vmap": "info has another shape under vmap"},
    "as_strided_scatter": {
        "finite_differences": "backward keeps the gradient where it belongs to src, not elsewhere"
    },
    "kron": {"stale_inputs_raise": "saves a view that does not notice changes in place"},
    "matrix_exp": {"linear_in_upstream": "backward loses digits if the upstream gradient is large"},
    "native_group_norm": {
        "outputs_alone": "the gradients of mean and rstd are lost if the output is not used"
    },
    "nn.CTCLoss": {"finite_differences": "the gradient is right only after a log_softmax"},
    "nn.functional.linear_cross_entropy/chunked": {
        "saves_nothing_on_ctx": "keeps the gradient on ctx"
    },
    "sgn": {"repeatable_backward": "a gradient of zeros cannot be added to"},
}
