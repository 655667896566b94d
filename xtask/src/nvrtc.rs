//! NVIDIA's run-time compiler, out of its PyPI wheel.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;

/// The last series that compiles for Volta.
const WHEELS: [&str; 2] = [
    "nvidia-cuda-nvrtc-cu12==12.9.86",
    "nvidia-cuda-runtime-cu12==12.9.79",
];

/// The compiler and the folder of its headers.
pub struct Nvrtc {
    library: Library,
    include: PathBuf,
}

/// What a source became.
pub struct Output {
    /// Machine code or PTX.
    pub code: Vec<u8>,
    /// What the compiler said, registers and spills of every kernel among it.
    pub log: String,
}

impl Nvrtc {
    /// Fetches the wheels once into `folder` and loads the compiler.
    pub fn fetch(folder: &Path) -> Result<Self, String> {
        let folder = std::env::var_os("NVRTC_WHEELS").map_or(folder.to_owned(), PathBuf::from);
        let library = folder.join("nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
        if !library.exists() {
            let run = |command: &mut Command| match command.status() {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(format!("{command:?} ended with {status}")),
                Err(error) => Err(format!("{command:?}: {error}")),
            };
            std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
            let python = |args: &[&str]| {
                let mut command = Command::new("python3");
                command.args(args).current_dir(&folder);
                command
            };
            run(python(&[
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                ".",
            ])
            .args(WHEELS))?;
            let files = std::fs::read_dir(&folder).map_err(|e| e.to_string())?;
            for file in files.flatten().map(|f| f.path()) {
                if file.extension().is_some_and(|e| e == "whl") {
                    run(python(&["-m", "zipfile", "--extract"]).arg(&file).arg("."))?;
                }
            }
        }
        // SAFETY: loads NVIDIA's library, whose initialisers are trusted as the compiler is.
        let library =
            unsafe { Library::new(&library) }.map_err(|e| format!("{}: {e}", library.display()))?;
        Ok(Self {
            library,
            include: folder.join("nvidia/cuda_runtime/include"),
        })
    }

    /// Compiles a source for `arch` (`"80"`, `"90a"`), or to PTX for 8.0: all GPUs that come later have its instructions.
    pub fn compile(&self, source: &Path, shared: &Path, arch: &str) -> Result<Output, String> {
        let name = source.display().to_string();
        let text = std::fs::read(source).map_err(|e| format!("{name}: {e}"))?;
        let c = |text: Vec<u8>| CString::new(text).map_err(|_| format!("{name} holds a zero byte"));
        let text = c(text)?;
        let title = c(source
            .file_name()
            .unwrap_or_default()
            .as_encoded_bytes()
            .to_vec())?;
        let target = match arch {
            "ptx" => "--gpu-architecture=compute_80".to_owned(),
            arch => format!("--gpu-architecture=sm_{arch}"),
        };
        let include = |path: &Path| format!("--include-path={}", path.display());
        let options = [
            target,
            "--std=c++17".to_owned(),
            "--ptxas-options=-v".to_owned(),
            include(&self.include),
            include(shared),
            include(source.parent().unwrap_or(shared)),
        ];
        let options = options.map(|o| CString::new(o).expect("an option holds no zero"));
        let options = options.each_ref().map(|o| o.as_ptr());

        let mut program: *mut c_void = std::ptr::null_mut();
        // SAFETY: the signatures are those of nvrtc.h of this version; all strings end with a zero and
        // outlive the calls; buffers are as large as the sizes that the library gave.
        unsafe {
            type Create = unsafe extern "C" fn(
                *mut *mut c_void,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int;
            type Compile = unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int;
            let none = std::ptr::null();
            let made = self.symbol::<Create>("nvrtcCreateProgram")?(
                &mut program,
                text.as_ptr(),
                title.as_ptr(),
                0,
                none,
                none,
            );
            if made != 0 {
                return Err(format!("nvrtcCreateProgram: error {made}"));
            }
            let count = options.len() as c_int;
            let compiled =
                self.symbol::<Compile>("nvrtcCompileProgram")?(program, count, options.as_ptr());
            let log = self.bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
            let log = CStr::from_bytes_until_nul(&log)
                .map_or(String::new(), |l| l.to_string_lossy().into_owned());
            if compiled != 0 {
                return Err(format!("{name} for {arch}:\n{log}"));
            }
            let code = match arch {
                "ptx" => self.bytes(program, "nvrtcGetPTXSize", "nvrtcGetPTX")?,
                _ => self.bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")?,
            };
            type Destroy = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
            self.symbol::<Destroy>("nvrtcDestroyProgram")?(&mut program);
            Ok(Output { code, log })
        }
    }

    /// # Safety
    /// `T` must be the function's type.
    unsafe fn symbol<T: Copy>(&self, name: &str) -> Result<T, String> {
        // SAFETY: the caller vouches for the type.
        let symbol = unsafe { self.library.get::<T>(name.as_bytes()) };
        symbol.map(|s| *s).map_err(|e| format!("{name}: {e}"))
    }

    /// # Safety
    /// `program` must be one of this library.
    unsafe fn bytes(&self, program: *mut c_void, size: &str, get: &str) -> Result<Vec<u8>, String> {
        type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
        type Get = unsafe extern "C" fn(*mut c_void, *mut u8) -> c_int;
        let mut count = 0;
        // SAFETY: the signatures are nvrtc.h's; the buffer is as large as the library said.
        unsafe {
            self.symbol::<Size>(size)?(program, &mut count);
            let mut bytes = vec![0; count];
            match self.symbol::<Get>(get)?(program, bytes.as_mut_ptr()) {
                0 => Ok(bytes),
                error => Err(format!("{get}: error {error}")),
            }
        }
    }
}
