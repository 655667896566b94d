//! Which instruction set the CPU kernels use, decided once at run time.
//!
//! Every kernel exists in a portable form that needs nothing but Rust, so a binary built for the
//! baseline of its target runs everywhere; faster forms are entered only after the CPU was asked.
//! The environment variable `KTX_CPU` (`portable`, `avx2`, `avx512` or `amx`) forces one level, for
//! tests and for comparing machines. A level that this CPU lacks is an error of [`requested`], never
//! an illegal instruction.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// Name of the environment variable that forces an instruction set.
pub const CPU_VARIABLE: &str = "KTX_CPU";

/// An instruction-set level that kernels are written for, from slowest to fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IsaLevel {
    /// No instruction beyond the target's baseline.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// [`Self::Avx512`] with its BF16 instructions and AMX tiles of BF16, which Linux has allowed this process.
    Amx,
}

impl IsaLevel {
    /// All levels, slowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The level's name, as `KTX_CPU` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// Whether this CPU, under this operating system, can execute the level's instructions.
    pub fn is_supported(self) -> bool {
        self <= detected()
    }

    /// The levels that this CPU can execute, slowest first.
    pub fn supported() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| level.is_supported())
    }
}

impl fmt::Display for IsaLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for IsaLevel {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        Self::ALL
            .into_iter()
            .find(|level| level.name().eq_ignore_ascii_case(text.trim()))
            .ok_or_else(|| CpuError::UnknownLevel {
                value: text.to_owned(),
            })
    }
}

/// Why the instruction set asked for in `KTX_CPU` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// The value names no level.
    #[error(
        "KTX_CPU={value} names no instruction set; use portable, avx2, avx512 or amx, or unset it"
    )]
    UnknownLevel {
        /// The variable's value.
        value: String,
    },
    /// The level exists, but this CPU or operating system lacks it.
    #[error(
        "KTX_CPU={level} asks for instructions that this CPU lacks; \
         the best it has is {best}: use that, or unset the variable"
    )]
    UnsupportedLevel {
        /// The level asked for.
        level: IsaLevel,
        /// The best level of this CPU.
        best: IsaLevel,
    },
}

/// The best level that this CPU and its operating system support. Asked once, then cached.
pub fn detected() -> IsaLevel {
    static DETECTED: OnceLock<IsaLevel> = OnceLock::new();
    *DETECTED.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> IsaLevel {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (true, true) if is_x86_feature_detected!("avx512bf16") && amx::allowed() => IsaLevel::Amx,
        (true, true) => IsaLevel::Avx512,
        (true, false) => IsaLevel::Avx2,
        _ => IsaLevel::Portable,
    }
}

/// Tiles are 8 KiB of registers that a process must ask the operating system for.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    /// Bits 22 and 24 of EDX in leaf 7: `AMX-BF16` and `AMX-TILE`.
    const TILES_OF_BF16: u32 = 1 << 22 | 1 << 24;
    const SYS_ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    /// The number of the tiles' data among the states that XSAVE keeps.
    const XFEATURE_XTILEDATA: usize = 18;

    /// Whether the CPU has tiles of BF16 and Linux lets this process use them. Asks for the permission, which
    /// then holds for all threads.
    pub(super) fn allowed() -> bool {
        #[allow(unused_unsafe, reason = "older compilers have it as unsafe")]
        // SAFETY: leaf 7 exists: the caller has found AVX-512.
        let edx = unsafe { __cpuid_count(7, 0) }.edx;
        edx & TILES_OF_BF16 == TILES_OF_BF16 && request() == 0
    }

    fn request() -> isize {
        let result;
        // SAFETY: a system call that changes no memory of this process; Linux clobbers RCX and R11. A kernel that
        // does not know the request returns an error.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") SYS_ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result
    }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
mod amx {
    /// Other systems are not asked.
    pub(super) fn allowed() -> bool {
        false
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> IsaLevel {
    IsaLevel::Portable
}

/// The level asked for with `KTX_CPU`, or the best one when the variable is unset or empty.
///
/// The variable is read once per process. An engine calls this when it starts, so that a wrong
/// value is reported and not ignored.
///
/// # Errors
/// [`CpuError`] when the value names no level, or one that this CPU lacks.
pub fn requested() -> Result<IsaLevel, CpuError> {
    static REQUESTED: OnceLock<Result<IsaLevel, CpuError>> = OnceLock::new();
    REQUESTED
        .get_or_init(|| match std::env::var_os(CPU_VARIABLE) {
            None => Ok(detected()),
            Some(value) => resolve(&value.to_string_lossy(), detected()),
        })
        .clone()
}

/// The level that kernels run at: [`requested`], or [`detected`] when the request is invalid.
pub fn level() -> IsaLevel {
    static LEVEL: OnceLock<IsaLevel> = OnceLock::new();
    *LEVEL.get_or_init(|| requested().unwrap_or_else(|_| detected()))
}

fn resolve(value: &str, best: IsaLevel) -> Result<IsaLevel, CpuError> {
    if value.trim().is_empty() {
        return Ok(best);
    }
    let level: IsaLevel = value.parse()?;
    if level > best {
        return Err(CpuError::UnsupportedLevel { level, best });
    }
    Ok(level)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_is_found_by_its_name() {
        for level in IsaLevel::ALL {
            assert_eq!(level.name().parse(), Ok(level));
            assert_eq!(level.name().to_uppercase().parse(), Ok(level));
        }
    }

    #[test]
    fn an_empty_request_takes_the_best_level() {
        assert_eq!(resolve("  ", IsaLevel::Avx2), Ok(IsaLevel::Avx2));
    }

    #[test]
    fn a_level_that_the_cpu_lacks_is_an_error() {
        assert_eq!(
            resolve("avx512", IsaLevel::Avx2),
            Err(CpuError::UnsupportedLevel {
                level: IsaLevel::Avx512,
                best: IsaLevel::Avx2
            })
        );
        assert_eq!(resolve("portable", IsaLevel::Avx2), Ok(IsaLevel::Portable));
    }

    #[test]
    fn an_unknown_level_is_an_error_that_names_the_choices() {
        let error = resolve("sse9", IsaLevel::Avx512).unwrap_err();
        assert!(
            error.to_string().contains("portable, avx2, avx512 or amx"),
            "{error}"
        );
    }
}
