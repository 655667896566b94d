//! `xtask kernels`: every `.cu` file to machine code for every generation of GPUs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::Failure;
use crate::nvrtc::Nvrtc;

/// Generations that have machine code of their own; `ptx` serves those that come later.
const ARCHS: [&str; 9] = ["70", "75", "80", "86", "89", "90a", "100", "120", "ptx"];

/// Bytes of registers that a kernel may keep in local memory, stores and loads each.
const SPILL_ALLOWANCE: u64 = 0;

/// Kernels that may spill more, with the reason beside them in their source.
const MAY_SPILL: [(&str, u64); 5] = [
    ("ktx_gemv", 8),
    ("ktx_gemv_8", 64),
    ("ktx_gemv_f32", 64),
    ("ktx_gemm_128", 128),
    ("ktx_moe_gate_up", 200),
];

/// What to compile.
#[derive(Default)]
pub struct Options {
    arch: Option<String>,
    only: Option<String>,
    check: bool,
    verbose: bool,
}

impl Options {
    /// Reads the command's arguments.
    pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "--arch" => {
                    let arch = value()?;
                    if !ARCHS.contains(&arch.as_str()) {
                        return Err(format!("no generation `{arch}`; there are {ARCHS:?}"));
                    }
                    options.arch = Some(arch);
                }
                "--only" => options.only = Some(value()?),
                "--check" => options.check = true,
                "--verbose" => options.verbose = true,
                _ => return Err(format!("no option `{arg}`; see xtask --help")),
            }
        }
        Ok(options)
    }
}

/// Compiles, and writes or compares.
pub fn run(options: &Options) -> Result<(), Failure> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ktx-kernels/src");
    let out = root.join("cuda/kernels");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    );
    let nvrtc = Nvrtc::fetch(&target.join("nvrtc")).map_err(Failure::NoCompiler)?;
    let mut modules = Vec::new();
    find(&root, &root, "cu", &mut modules)?;
    modules.sort();
    let mut wrong = Vec::new();
    for module in &modules {
        if options.only.as_ref().is_some_and(|only| only != module) {
            continue;
        }
        for arch in ARCHS {
            if options.arch.as_ref().is_some_and(|only| only != arch) {
                continue;
            }
            let source = root.join(format!("{module}.cu"));
            let output = nvrtc.compile(&source, &root.join("cuda"), arch)?;
            wrong.extend(spills(module, arch, &output.log));
            if options.verbose {
                print!("{module} {arch}\n{}", output.log);
            }
            let file = out.join(file_name(module, arch));
            let deflated = miniz_oxide::deflate::compress_to_vec(&output.code, 9);
            if options.check {
                if std::fs::read(&file).ok().as_deref() != Some(&deflated) {
                    wrong.push(format!("{} is not what its source gives", file.display()));
                }
            } else {
                std::fs::write(&file, deflated).map_err(|e| format!("{}: {e}", file.display()))?;
            }
        }
    }
    if !options.check {
        write_table(&root, &out, &modules)?;
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(Failure::Wrong(wrong.join("\n"))),
    }
}

fn file_name(module: &str, arch: &str) -> String {
    format!("{}.{arch}.z", module.replace('/', "_"))
}

/// Paths of all files with this ending, without it, below `folder`.
fn find(root: &Path, folder: &Path, ending: &str, found: &mut Vec<String>) -> Result<(), String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for path in entries.flatten().map(|e| e.path()) {
        if path.is_dir() {
            find(root, &path, ending, found)?;
        } else if path.extension().is_some_and(|e| e == ending) {
            let path = path.with_extension("");
            let relative = path.strip_prefix(root).map_err(|e| e.to_string())?;
            found.push(relative.to_string_lossy().replace('\\', "/"));
        }
    }
    Ok(())
}

/// Kernels that keep registers in memory beyond what is allowed.
fn spills(module: &str, arch: &str, log: &str) -> Vec<String> {
    let mut kernel = "";
    let mut found = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap_or(rest);
        }
        let allowed = MAY_SPILL
            .iter()
            .find(|(name, _)| *name == kernel)
            .map_or(SPILL_ALLOWANCE, |(_, bytes)| *bytes);
        for part in line.split(',').filter(|p| p.contains("bytes spill")) {
            let bytes = part
                .trim()
                .split(' ')
                .next()
                .and_then(|n| n.parse::<u64>().ok());
            if bytes.is_some_and(|b| b > allowed) {
                found.push(format!(
                    "{module} for {arch}: {kernel}:{part}, allowed are {allowed}"
                ));
            }
        }
    }
    found
}

/// The table that the crate includes, with what every source was when it was compiled.
fn write_table(root: &Path, out: &Path, modules: &[String]) -> Result<(), String> {
    let mut headers = Vec::new();
    find(root, root, "cuh", &mut headers)?;
    headers.sort();
    let mut text = String::from(
        "// Written by `cargo run -p xtask -- kernels`.\n\nstatic COMPILED: &[Compiled] = &[\n",
    );
    for module in modules {
        let include = |arch: &str| format!("include_bytes!(\"{}\")", file_name(module, arch));
        writeln!(
            text,
            "    Compiled {{\n        module: \"{module}\",\n        cubins: &["
        )
        .ok();
        for arch in ARCHS.iter().filter(|a| **a != "ptx") {
            let number = arch.trim_end_matches('a');
            writeln!(text, "            ({number}, {}),", include(arch)).ok();
        }
        writeln!(
            text,
            "        ],\n        ptx: {},\n    }},",
            include("ptx")
        )
        .ok();
    }
    text.push_str("];\n\n#[cfg(test)]\nstatic SOURCES: &[(&str, u64)] = &[\n");
    let files = modules
        .iter()
        .map(|m| format!("{m}.cu"))
        .chain(headers.iter().map(|h| format!("{h}.cuh")));
    for file in files {
        let bytes = std::fs::read(root.join(&file)).map_err(|e| format!("{file}: {e}"))?;
        writeln!(text, "    (\"{file}\", {:#x}),", hash(&bytes)).ok();
    }
    text.push_str("];\n");
    let table = out.join("table.rs");
    std::fs::write(&table, text).map_err(|e| format!("{}: {e}", table.display()))
}

/// FNV-1a of a source, line ends aside.
fn hash(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().filter(|b| **b != b'\r');
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
