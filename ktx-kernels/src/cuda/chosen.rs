//! Which of the driver's GPUs are used, and under which numbers.

use super::error::CudaError;

/// Name of the environment variable that chooses GPUs: the driver's numbers of `cuda:0`, `cuda:1` and so on, with
/// commas between them. A number that is there twice makes two GPUs of one: each has a stream and an equal share of
/// the memory, so that rules for several GPUs run on a machine with one.
pub const GPUS_VARIABLE: &str = "KTX_GPUS";

/// What the variable says; none if it is not set.
///
/// # Errors
/// [`CudaError::BadGpuList`] for anything but numbers and commas.
pub(super) fn wanted() -> Result<Option<Vec<u16>>, CudaError> {
    match std::env::var_os(GPUS_VARIABLE) {
        Some(value) => parse(&value.to_string_lossy()).map(Some),
        None => Ok(None),
    }
}

fn parse(value: &str) -> Result<Vec<u16>, CudaError> {
    if value.trim().is_empty() {
        return Ok(Vec::new());
    }
    let numbers = value.split(',').map(|number| number.trim().parse());
    numbers
        .collect::<Result<_, _>>()
        .map_err(|_| CudaError::BadGpuList {
            value: value.to_owned(),
        })
}

/// The driver's numbers of the GPUs to use, of which the driver has `count`.
///
/// # Errors
/// [`CudaError::NoGpuWanted`] if none is to be used, [`CudaError::UnknownGpu`] for a number that the driver lacks.
pub(super) fn chosen(wanted: Option<Vec<u16>>, count: u16) -> Result<Vec<u16>, CudaError> {
    let Some(wanted) = wanted else {
        return Ok((0..count).collect());
    };
    if wanted.is_empty() {
        return Err(CudaError::NoGpuWanted);
    }
    match wanted.iter().find(|number| **number >= count) {
        Some(number) => Err(CudaError::UnknownGpu {
            number: *number,
            count: usize::from(count),
        }),
        None => Ok(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_gpus_are_numbers_with_commas() {
        assert_eq!(parse("0"), Ok(vec![0]));
        assert_eq!(parse(" 3, 0,3 "), Ok(vec![3, 0, 3]));
        assert_eq!(parse(" "), Ok(vec![]));
        for bad in ["cuda:0", "0,", ",", "0 1", "-1", "0;1", "70000", "all"] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(
                error.contains(&format!("KTX_GPUS={bad} ")) && error.contains("KTX_GPUS=0,1"),
                "{error}"
            );
        }
    }

    #[test]
    fn chosen_gpus_are_in_the_wanted_order_and_may_repeat() {
        assert_eq!(chosen(None, 3), Ok(vec![0, 1, 2]));
        assert_eq!(chosen(Some(vec![2, 0, 2]), 3), Ok(vec![2, 0, 2]));
        let error = chosen(Some(vec![0, 1]), 1).unwrap_err().to_string();
        assert!(
            error.contains("KTX_GPUS") && error.contains("GPU 1") && error.contains("0 to 0"),
            "{error}"
        );
        let error = chosen(Some(vec![]), 1).unwrap_err().to_string();
        assert!(error.contains("KTX_GPUS is empty"), "{error}");
    }
}
