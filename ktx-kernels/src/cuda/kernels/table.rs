// Written by `cargo run -p xtask -- kernels`.

static COMPILED: &[Compiled] = &[
    Compiled {
        module: "activation/activation",
        cubins: &[
            (70, include_bytes!("activation_activation.70.z")),
            (75, include_bytes!("activation_activation.75.z")),
            (80, include_bytes!("activation_activation.80.z")),
            (86, include_bytes!("activation_activation.86.z")),
            (89, include_bytes!("activation_activation.89.z")),
            (90, include_bytes!("activation_activation.90a.z")),
            (100, include_bytes!("activation_activation.100.z")),
            (120, include_bytes!("activation_activation.120.z")),
        ],
        ptx: include_bytes!("activation_activation.ptx.z"),
    },
    Compiled {
        module: "cuda/handover",
        cubins: &[
            (70, include_bytes!("cuda_handover.70.z")),
            (75, include_bytes!("cuda_handover.75.z")),
            (80, include_bytes!("cuda_handover.80.z")),
            (86, include_bytes!("cuda_handover.86.z")),
            (89, include_bytes!("cuda_handover.89.z")),
            (90, include_bytes!("cuda_handover.90a.z")),
            (100, include_bytes!("cuda_handover.100.z")),
            (120, include_bytes!("cuda_handover.120.z")),
        ],
        ptx: include_bytes!("cuda_handover.ptx.z"),
    },
    Compiled {
        module: "gate/gate",
        cubins: &[
            (70, include_bytes!("gate_gate.70.z")),
            (75, include_bytes!("gate_gate.75.z")),
            (80, include_bytes!("gate_gate.80.z")),
            (86, include_bytes!("gate_gate.86.z")),
            (89, include_bytes!("gate_gate.89.z")),
            (90, include_bytes!("gate_gate.90a.z")),
            (100, include_bytes!("gate_gate.100.z")),
            (120, include_bytes!("gate_gate.120.z")),
        ],
        ptx: include_bytes!("gate_gate.ptx.z"),
    },
    Compiled {
        module: "norm/norm",
        cubins: &[
            (70, include_bytes!("norm_norm.70.z")),
            (75, include_bytes!("norm_norm.75.z")),
            (80, include_bytes!("norm_norm.80.z")),
            (86, include_bytes!("norm_norm.86.z")),
            (89, include_bytes!("norm_norm.89.z")),
            (90, include_bytes!("norm_norm.90a.z")),
            (100, include_bytes!("norm_norm.100.z")),
            (120, include_bytes!("norm_norm.120.z")),
        ],
        ptx: include_bytes!("norm_norm.ptx.z"),
    },
    Compiled {
        module: "rope/rope",
        cubins: &[
            (70, include_bytes!("rope_rope.70.z")),
            (75, include_bytes!("rope_rope.75.z")),
            (80, include_bytes!("rope_rope.80.z")),
            (86, include_bytes!("rope_rope.86.z")),
            (89, include_bytes!("rope_rope.89.z")),
            (90, include_bytes!("rope_rope.90a.z")),
            (100, include_bytes!("rope_rope.100.z")),
            (120, include_bytes!("rope_rope.120.z")),
        ],
        ptx: include_bytes!("rope_rope.ptx.z"),
    },
    Compiled {
        module: "rows/rows",
        cubins: &[
            (70, include_bytes!("rows_rows.70.z")),
            (75, include_bytes!("rows_rows.75.z")),
            (80, include_bytes!("rows_rows.80.z")),
            (86, include_bytes!("rows_rows.86.z")),
            (89, include_bytes!("rows_rows.89.z")),
            (90, include_bytes!("rows_rows.90a.z")),
            (100, include_bytes!("rows_rows.100.z")),
            (120, include_bytes!("rows_rows.120.z")),
        ],
        ptx: include_bytes!("rows_rows.ptx.z"),
    },
    Compiled {
        module: "topk/topk",
        cubins: &[
            (70, include_bytes!("topk_topk.70.z")),
            (75, include_bytes!("topk_topk.75.z")),
            (80, include_bytes!("topk_topk.80.z")),
            (86, include_bytes!("topk_topk.86.z")),
            (89, include_bytes!("topk_topk.89.z")),
            (90, include_bytes!("topk_topk.90a.z")),
            (100, include_bytes!("topk_topk.100.z")),
            (120, include_bytes!("topk_topk.120.z")),
        ],
        ptx: include_bytes!("topk_topk.ptx.z"),
    },
];

#[cfg(test)]
static SOURCES: &[(&str, u64)] = &[
    ("activation/activation.cu", 0xa4a4e5bb28d4b8d8),
    ("cuda/handover.cu", 0x3f838a029a56e2f9),
    ("gate/gate.cu", 0x2b19c23c9e5bb2b0),
    ("norm/norm.cu", 0xaf6004a2bef2a643),
    ("rope/rope.cu", 0x5ef4a20f1674bb92),
    ("rows/rows.cu", 0x967ee1206de5dfb2),
    ("topk/topk.cu", 0xd63f2827d8c5528a),
    ("cuda/reduce.cuh", 0x339369bd490e783b),
];
