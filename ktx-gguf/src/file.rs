//! Opening models: one file or several parts, mapped or in memory.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::header::{self, Header};
use crate::split::SplitName;
use crate::storage::Storage;
use crate::tensor::shape_bytes;
use crate::{GgmlType, GgufError, Metadata, Place, Tensor, TensorInfo, Value, limits};

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NO: &str = "split.no";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// An open model. Cheap to clone.
///
/// Everything in the header was checked when it was opened: after that no accessor can fail on it, and every
/// tensor's bytes lie inside the file.
#[derive(Clone)]
pub struct Gguf {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    path: Option<PathBuf>,
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    /// None for a model of which only the header is known.
    parts: Vec<Arc<Storage>>,
}

impl Gguf {
    /// A model that is described and not there: metadata, and name, type and shape of each tensor (row
    /// length first). [`Self::tensor_info`] knows every tensor, [`Self::tensor`] finds none. Offsets are
    /// those of a file with the default alignment, and count from the first tensor.
    ///
    /// ```
    /// use ktx_gguf::{GgmlType, Gguf};
    ///
    /// let metadata = vec![("general.architecture".to_owned(), "llama".into())];
    /// let tensors = [("output.weight".to_owned(), GgmlType::Q4_K, vec![4096, 32000])];
    /// let model = Gguf::described("a plan", metadata, tensors)?;
    /// assert_eq!(model.tensor_info("output.weight").map(|t| t.bytes), Some(73_728_000));
    /// assert!(model.tensor("output.weight").is_none());
    /// # Ok::<(), ktx_gguf::GgufError>(())
    /// ```
    ///
    /// # Errors
    /// [`GgufError::InvalidShape`] where no tensor of that type can have that shape, and as
    /// [`Gguf::open`] where a name or a key is there twice.
    pub fn described(
        name: &str,
        metadata: Vec<(String, Value)>,
        tensors: impl IntoIterator<Item = (String, GgmlType, Vec<usize>)>,
    ) -> Result<Self, GgufError> {
        let mut infos = Vec::new();
        let mut offset = 0_u64;
        for (tensor, ty, shape) in tensors {
            let bytes = shape_bytes(&tensor, ty, &shape)? as u64;
            infos.push(TensorInfo {
                name: tensor,
                ty,
                shape,
                offset,
                bytes,
                part: 0,
            });
            offset += bytes.next_multiple_of(header::DEFAULT_ALIGNMENT);
        }
        let header = Header {
            version: 3,
            metadata: Metadata::from_entries(name, metadata)?,
            tensors: infos,
        };
        let described = Self::assemble(
            name.to_owned(),
            None,
            vec![(header, Storage::Bytes(Vec::new()))],
        )?;
        let mut inner =
            Arc::into_inner(described.inner).expect("nobody else holds what was just made");
        inner.parts.clear();
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Whether the tensors' bytes are there: not in a model that was only described.
    pub fn has_data(&self) -> bool {
        !self.inner.parts.is_empty()
    }

    /// Maps a file and validates its header. Of a split model (`name-00001-of-00003.gguf`) any part may be named;
    /// all parts are opened.
    ///
    /// The file must not be changed or truncated while the model (or a tensor of it) is in use: its bytes are read
    /// from the map, not from a copy.
    ///
    /// # Errors
    /// When the file cannot be opened, is not GGUF version 2 or 3, or anything in its header does not hold; when a
    /// part is missing or belongs to another model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let storage = Storage::map(path)?;
        let name = path.display().to_string();
        let header = header::parse(&name, storage.bytes(), 0)?;
        let split = SplitName::parse(path).filter(|split| split.count > 1);
        let parts = split_count(&name, &header.metadata)?.unwrap_or(1);
        if parts == 1 {
            if let Some(split) = split {
                return Err(split_mismatch(&name, SPLIT_COUNT, parts, split.count));
            }
            return Self::assemble(name, Some(path.to_owned()), vec![(header, storage)]);
        }
        let Some(split) = split else {
            let hint = "give it and the other parts their original names back";
            return Err(GgufError::SplitName {
                file: name,
                count: parts,
                hint,
            });
        };
        if split.count != parts {
            return Err(split_mismatch(&name, SPLIT_COUNT, parts, split.count));
        }
        let first = split.part(1);
        let parts = open_parts(&split, path, header, storage)?;
        Self::assemble(first.display().to_string(), Some(first), parts)
    }

    /// A model embedded in the program; `name` stands for the path in error texts.
    ///
    /// # Errors
    /// As [`Gguf::open`]; a part of a split model is refused.
    pub fn from_static(bytes: &'static [u8], name: &str) -> Result<Self, GgufError> {
        Self::from_storage(Storage::Static(bytes), name)
    }

    /// A model in memory; `name` stands for the path in error texts.
    ///
    /// # Errors
    /// As [`Gguf::open`]; a part of a split model is refused.
    pub fn from_vec(bytes: Vec<u8>, name: &str) -> Result<Self, GgufError> {
        Self::from_storage(Storage::Bytes(bytes), name)
    }

    fn from_storage(storage: Storage, name: &str) -> Result<Self, GgufError> {
        let header = header::parse(name, storage.bytes(), 0)?;
        match split_count(name, &header.metadata)? {
            Some(count) if count > 1 => {
                let hint =
                    "open it from a file, or merge the parts with `llama-gguf-split --merge`";
                Err(GgufError::SplitName {
                    file: name.to_owned(),
                    count,
                    hint,
                })
            }
            _ => Self::assemble(name.to_owned(), None, vec![(header, storage)]),
        }
    }

    /// Puts the parts together; they are in order, and there is at least one.
    fn assemble(
        name: String,
        path: Option<PathBuf>,
        parts: Vec<(Header, Storage)>,
    ) -> Result<Self, GgufError> {
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut by_name = HashMap::new();
        let mut storages = Vec::with_capacity(parts.len());
        let mut first = None;
        for (header, storage) in parts {
            for (index, tensor) in header.tensors.into_iter().enumerate() {
                if let Some(earlier) = by_name.insert(tensor.name.clone(), tensors.len()) {
                    let field = format!("tensor_infos[{index}].name of part {}", tensor.part + 1);
                    let place = Place {
                        file: name,
                        field,
                        offset: 0,
                    };
                    return Err(GgufError::DuplicateTensor {
                        place,
                        name: tensor.name,
                        first: earlier,
                    });
                }
                tensors.push(tensor);
            }
            storages.push(Arc::new(storage));
            first.get_or_insert((header.version, header.metadata));
        }
        let (version, metadata) = first.expect("a model has at least one part");
        check_split_tensors(&name, &metadata, tensors.len())?;
        let inner = Inner {
            name,
            path,
            version,
            metadata,
            tensors,
            by_name,
            parts: storages,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The path (of the first part), or the name given to bytes in memory.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The path (of the first part); `None` for bytes in memory.
    pub fn path(&self) -> Option<&Path> {
        self.inner.path.as_deref()
    }

    /// The version of the container format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.inner.version
    }

    /// Bytes of the file, or of all parts together; of a model that was only described, those of its
    /// tensors.
    pub fn file_size(&self) -> u64 {
        if !self.has_data() {
            return self.inner.tensors.iter().map(|tensor| tensor.bytes).sum();
        }
        self.inner
            .parts
            .iter()
            .map(|part| part.bytes().len() as u64)
            .sum()
    }

    /// Number of files: 1 unless the model is split, 0 if it was only described.
    pub fn parts(&self) -> usize {
        self.inner.parts.len()
    }

    /// The metadata (of the first part; the others have only split information).
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }

    /// What the header says about each tensor, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.inner.tensors.iter()
    }

    /// What the header says about a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.inner
            .by_name
            .get(name)
            .map(|&index| &self.inner.tensors[index])
    }

    /// A tensor with its bytes.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let info = self.tensor_info(name)?;
        let storage = Arc::clone(self.inner.parts.get(info.part)?);
        let start = info.offset as usize;
        Some(Tensor::in_storage(
            &info.name,
            info.ty,
            &info.shape,
            storage,
            start..start + info.bytes as usize,
        ))
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Gguf({}, {} tensors)",
            self.name(),
            self.inner.tensors.len()
        )
    }
}

fn split_mismatch(
    file: &str,
    key: &'static str,
    found: impl fmt::Display,
    expected: impl fmt::Display,
) -> GgufError {
    GgufError::SplitMismatch {
        file: file.to_owned(),
        key,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// The number of parts that a file's metadata states.
fn split_count(file: &str, metadata: &Metadata) -> Result<Option<usize>, GgufError> {
    match metadata.u64(SPLIT_COUNT)? {
        Some(count) if count > limits::SPLIT_PARTS => Err(split_mismatch(
            file,
            SPLIT_COUNT,
            count,
            format_args!("at most {}", limits::SPLIT_PARTS),
        )),
        // A count of 0 is written by tools for models that are not split.
        Some(count) => Ok(Some((count as usize).max(1))),
        None => Ok(None),
    }
}

/// Opens the parts other than the one that is open already, and checks that all belong together.
fn open_parts(
    split: &SplitName,
    opened: &Path,
    header: Header,
    storage: Storage,
) -> Result<Vec<(Header, Storage)>, GgufError> {
    let mut given = Some((header, storage));
    let mut parts = Vec::new();
    for number in 1..=split.count {
        let is_given = number == split.number;
        let path = if is_given {
            opened.to_owned()
        } else {
            split.part(number)
        };
        let name = path.display().to_string();
        let (mut header, storage) = match given.take_if(|_| is_given) {
            Some(part) => part,
            None if !path.exists() => {
                return Err(GgufError::MissingPart {
                    path,
                    number,
                    count: split.count,
                });
            }
            None => {
                let storage = Storage::map(&path)?;
                (header::parse(&name, storage.bytes(), number - 1)?, storage)
            }
        };
        header
            .tensors
            .iter_mut()
            .for_each(|tensor| tensor.part = number - 1);
        check_part(&name, &header.metadata, number, split.count)?;
        parts.push((header, storage));
    }
    let expected = parts[0].0.metadata.u64(SPLIT_TENSORS)?;
    for (number, (header, _)) in parts.iter().enumerate() {
        let found = header.metadata.u64(SPLIT_TENSORS)?;
        if found != expected {
            let name = split.part(number + 1).display().to_string();
            return Err(split_mismatch(
                &name,
                SPLIT_TENSORS,
                show(found),
                show(expected),
            ));
        }
    }
    Ok(parts)
}

fn check_part(
    file: &str,
    metadata: &Metadata,
    number: usize,
    count: usize,
) -> Result<(), GgufError> {
    let expected = |key, value: usize| {
        let found = metadata.u64(key)?;
        if found == Some(value as u64) {
            Ok(())
        } else {
            Err(split_mismatch(file, key, show(found), value))
        }
    };
    expected(SPLIT_COUNT, count)?;
    expected(SPLIT_NO, number - 1)
}

/// What a model states about its split when all its parts are there.
fn check_split_tensors(file: &str, metadata: &Metadata, tensors: usize) -> Result<(), GgufError> {
    // Merging tools set the count of parts to 0 and leave the other keys as they were.
    if metadata.u64(SPLIT_COUNT)?.unwrap_or(0) == 0 {
        return Ok(());
    }
    match metadata.u64(SPLIT_TENSORS)? {
        Some(count) if count != tensors as u64 => {
            let expected = format_args!("{tensors}, the tensors that are there");
            Err(split_mismatch(file, SPLIT_TENSORS, count, expected))
        }
        _ => Ok(()),
    }
}

fn show(number: Option<u64>) -> String {
    number.map_or_else(|| "missing".to_owned(), |number| number.to_string())
}
