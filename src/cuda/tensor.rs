use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut,
    DeviceSlice, SyncOnDrop,
};
use half::{bf16, f16};

use crate::batch::check_count;
use crate::call::{
    HARD_MASK, INDICES, LOG_PROBS, RawLabels, RawLogits, RawSparseTeacher, RawTokens,
    TARGET_LOG_PROBS, TEMPERATURES, TOKEN_WEIGHTS,
};
use crate::logits::{check_length, check_vocab};
use crate::{Dtype, Error, Result, SparseTeacher, Strides, Tail};

macro_rules! elements {
    ($(#[$doc:meta])* $name:ident, $view:ident, $slice:ident: $($kind:tt)+) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $name<'a> {
            /// float32
            F32($view<'a, f32>),
            /// float16
            F16($view<'a, f16>),
            /// bfloat16
            Bf16($view<'a, bf16>),
        }

        impl $name<'_> {
            pub(super) fn dtype(&self) -> Dtype {
                match self {
                    Self::F32(_) => Dtype::F32,
                    Self::F16(_) => Dtype::F16,
                    Self::Bf16(_) => Dtype::Bf16,
                }
            }

            pub(crate) fn len(&self) -> usize {
                match self {
                    Self::F32(view) => view.len(),
                    Self::F16(view) => view.len(),
                    Self::Bf16(view) => view.len(),
                }
            }

            pub(super) fn context(&self) -> &CudaContext {
                match self {
                    Self::F32(view) => view.stream().context(),
                    Self::F16(view) => view.stream().context(),
                    Self::Bf16(view) => view.stream().context(),
                }
            }
        }

        elements!(@from $name, $view, $slice, [$($kind)+], f32 => F32, f16 => F16, bf16 => Bf16);
    };
    (@from $name:ident, $view:ident, $slice:ident, $kind:tt, $($element:ty => $variant:ident),+) => {
        $(
            impl<'a> From<$view<'a, $element>> for $name<'a> {
                fn from(view: $view<'a, $element>) -> Self {
                    Self::$variant(view)
                }
            }
            elements!(@slice $name, $slice, $kind, $element, $variant);
        )+
    };
    (@slice $name:ident, $slice:ident, [&], $element:ty, $variant:ident) => {
        impl<'a> From<&'a $slice<$element>> for $name<'a> {
            fn from(slice: &'a $slice<$element>) -> Self {
                Self::$variant(slice.as_view())
            }
        }
    };
    (@slice $name:ident, $slice:ident, [&mut], $element:ty, $variant:ident) => {
        impl<'a> From<&'a mut $slice<$element>> for $name<'a> {
            fn from(slice: &'a mut $slice<$element>) -> Self {
                Self::$variant(slice.as_view_mut())
            }
        }
    };
}

elements!(
    /// Numbers on the device, such as logits, of one of three dtypes.
    DeviceElements, CudaView, CudaSlice: &
);
elements!(
    /// Numbers on the device that may be written.
    DeviceElementsMut, CudaViewMut, CudaSlice: &mut
);

impl DeviceElements<'_> {
    /// The address for work on `stream`, and what must outlive the launches.
    pub(super) fn address<'a>(&'a self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        match self {
            Self::F32(view) => view.device_ptr(stream),
            Self::F16(view) => view.device_ptr(stream),
            Self::Bf16(view) => view.device_ptr(stream),
        }
    }
}

impl DeviceElementsMut<'_> {
    /// See [`DeviceElements::address`].
    pub(super) fn address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        match self {
            Self::F32(view) => view.device_ptr_mut(stream),
            Self::F16(view) => view.device_ptr_mut(stream),
            Self::Bf16(view) => view.device_ptr_mut(stream),
        }
    }
}

macro_rules! logits {
    ($(#[$doc:meta])* $name:ident, $elements:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<'a> {
            pub(super) elements: $elements<'a>,
            pub(super) shape: [usize; 2],
            /// Logits in a row, of which the first `shape[1]` count.
            columns: usize,
            strides: Strides,
        }

        impl<'a> $name<'a> {
            /// Contiguous `[tokens, vocab]`.
            ///
            /// # Errors
            /// If there are not exactly `tokens * vocab` elements, or `vocab` is 0.
            pub fn new(elements: impl Into<$elements<'a>>, tokens: usize, vocab: usize) -> Result<Self> {
                let elements = elements.into();
                let strides = vocab.into();
                check_length("logits", elements.len(), [tokens, vocab], strides, true)?;
                Ok(Self { elements, shape: [tokens, vocab], columns: vocab, strides })
            }

            /// Rows that start where `strides` say: a row stride, or [`Strides::nested`]. What lies between them
            /// is not touched.
            ///
            /// # Errors
            /// If two rows share an element, `vocab` is 0, or the elements end before the last row does.
            pub fn strided(
                elements: impl Into<$elements<'a>>,
                tokens: usize,
                vocab: usize,
                strides: impl Into<Strides>,
            ) -> Result<Self> {
                let (elements, strides) = (elements.into(), strides.into());
                check_length("logits", elements.len(), [tokens, vocab], strides, false)?;
                Ok(Self { elements, shape: [tokens, vocab], columns: vocab, strides })
            }

            /// The first `vocab` columns alone: see [`Logits::with_vocab`](crate::Logits::with_vocab). A call whose
            /// gradient this is makes the others 0.
            ///
            /// # Errors
            /// As there.
            pub fn with_vocab(mut self, vocab: usize) -> Result<Self> {
                check_vocab(vocab, self.columns)?;
                self.shape[1] = vocab;
                Ok(self)
            }

            pub(super) fn context(&self) -> &CudaContext {
                self.elements.context()
            }
        }
    };
}

logits!(
    /// Logits `[tokens, vocab]` on the device, each row contiguous, rows where [`Strides`] say.
    DeviceLogits, DeviceElements
);
logits!(
    /// Mutable logits, or a gradient, `[tokens, vocab]` on the device: see [`DeviceLogits`].
    DeviceLogitsMut, DeviceElementsMut
);

impl DeviceLogits<'_> {
    /// The address for work on `stream`, and what must outlive the launches.
    pub(super) fn raw<'a>(&'a self, stream: &'a CudaStream) -> (RawLogits, SyncOnDrop<'a>) {
        let (address, guard) = self.elements.address(stream);
        (RawLogits { address, dtype: self.elements.dtype(), strides: self.strides }, guard)
    }
}

impl DeviceLogitsMut<'_> {
    /// The columns that a gradient has beyond the vocabulary.
    pub(super) fn padding(&self) -> usize {
        self.columns - self.shape[1]
    }

    /// See [`DeviceLogits::raw`].
    pub(crate) fn raw<'a>(&'a mut self, stream: &'a CudaStream) -> (RawLogits, SyncOnDrop<'a>) {
        let (dtype, strides) = (self.elements.dtype(), self.strides);
        let (address, guard) = self.elements.address(stream);
        (RawLogits { address, dtype, strides }, guard)
    }
}

/// One label a token, on the device.
#[derive(Debug)]
pub enum DeviceLabels<'a> {
    /// 64 bits, as PyTorch has them.
    I64(CudaView<'a, i64>),
    /// 32 bits.
    I32(CudaView<'a, i32>),
}

impl<'a> From<&'a CudaSlice<i64>> for DeviceLabels<'a> {
    fn from(slice: &'a CudaSlice<i64>) -> Self {
        Self::I64(slice.as_view())
    }
}

impl<'a> From<&'a CudaSlice<i32>> for DeviceLabels<'a> {
    fn from(slice: &'a CudaSlice<i32>) -> Self {
        Self::I32(slice.as_view())
    }
}

impl<'a> From<CudaView<'a, i64>> for DeviceLabels<'a> {
    fn from(view: CudaView<'a, i64>) -> Self {
        Self::I64(view)
    }
}

impl<'a> From<CudaView<'a, i32>> for DeviceLabels<'a> {
    fn from(view: CudaView<'a, i32>) -> Self {
        Self::I32(view)
    }
}

impl DeviceLabels<'_> {
    fn len(&self) -> usize {
        match self {
            Self::I64(view) => view.len(),
            Self::I32(view) => view.len(),
        }
    }

    pub(super) fn context(&self) -> &CudaContext {
        match self {
            Self::I64(view) => view.stream().context(),
            Self::I32(view) => view.stream().context(),
        }
    }

    pub(super) fn raw<'a>(&'a self, stream: &'a CudaStream) -> (RawLabels, SyncOnDrop<'a>) {
        match self {
            Self::I64(view) => {
                let (address, guard) = view.device_ptr(stream);
                (RawLabels::I64(address), guard)
            }
            Self::I32(view) => {
                let (address, guard) = view.device_ptr(stream);
                (RawLabels::I32(address), guard)
            }
        }
    }
}

/// The tokens of a batch on the device without their logits: what a call in stages begins with.
#[derive(Debug)]
pub struct DeviceTokens<'a> {
    /// Tokens and logits in a row.
    pub(super) shape: [usize; 2],
    pub(super) labels: Option<DeviceLabels<'a>>,
    sequences: Option<CudaView<'a, i64>>,
    margins: Option<CudaView<'a, f32>>,
    hard: Option<CudaView<'a, u8>>,
    token_weights: Option<CudaView<'a, f32>>,
    pub(super) temperatures: Option<CudaView<'a, f32>>,
}

impl<'a> DeviceTokens<'a> {
    /// There are as many tokens as labels, each with a row of `vocab` logits.
    pub fn new(labels: impl Into<DeviceLabels<'a>>, vocab: usize) -> Self {
        let labels = labels.into();
        let tokens = Self::unlabelled(labels.len(), vocab);
        Self { labels: Some(labels), ..tokens }
    }

    /// Tokens without labels, for objectives with [`Target::Teacher`](crate::Target::Teacher).
    pub fn unlabelled(tokens: usize, vocab: usize) -> Self {
        let shape = [tokens, vocab];
        Self {
            shape,
            labels: None,
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
        }
    }

    /// Selects hard tokens within each sequence instead of the whole batch, which is this call's tokens. Sequence `i` is
    /// tokens `offsets[i]..offsets[i + 1]`; the first offset is 0, the last the number of tokens. They are on the
    /// device, where a kernel checks them.
    ///
    /// # Errors
    /// If there is no offset at all.
    pub fn with_sequences(mut self, offsets: CudaView<'a, i64>) -> Result<Self> {
        if offsets.is_empty() {
            let ([tokens, _], reason) = (self.shape, "there must be at least one");
            return Err(Error::Sequences { index: 0, offset: 0, tokens, reason });
        }
        self.sequences = Some(offsets);
        Ok(self)
    }

    /// Selects hard tokens by these margins, the log-odds against the target: the teacher's from an earlier
    /// pass, say. The teacher's logits are then read once less.
    ///
    /// # Errors
    /// If there is not one margin a token.
    pub fn with_margins(mut self, margins: CudaView<'a, f32>) -> Result<Self> {
        let [tokens, _] = self.shape;
        if margins.len() != tokens {
            return Err(Error::MarginCount { margins: margins.len(), tokens });
        }
        self.margins = Some(margins);
        Ok(self)
    }

    /// The hard tokens, a byte per token, 0 or not, from a selection made elsewhere: nothing is selected then, and the
    /// objective's hard ratio, sequences and margins are not used. The teacher's logits are read once. Ignored tokens stay
    /// ignored.
    ///
    /// # Errors
    /// If there is not one byte per token.
    pub fn with_hard(mut self, hard: CudaView<'a, u8>) -> Result<Self> {
        check_count(HARD_MASK, hard.len(), self.shape[0])?;
        self.hard = Some(hard);
        Ok(self)
    }

    /// Multiplies the weights of each token's terms: see [`Batch::with_token_weights`](crate::Batch::with_token_weights).
    ///
    /// # Errors
    /// If there is not one weight per token.
    pub fn with_token_weights(mut self, weights: CudaView<'a, f32>) -> Result<Self> {
        check_count(TOKEN_WEIGHTS, weights.len(), self.shape[0])?;
        self.token_weights = Some(weights);
        Ok(self)
    }

    /// Gives each token a temperature of its own: see [`Batch::with_temperatures`](crate::Batch::with_temperatures). The loss
    /// of a token whose temperature is not in [1e-30, 1e30] is NaN.
    ///
    /// # Errors
    /// If there is not one temperature per token.
    pub fn with_temperatures(mut self, temperatures: CudaView<'a, f32>) -> Result<Self> {
        check_count(TEMPERATURES, temperatures.len(), self.shape[0])?;
        self.temperatures = Some(temperatures);
        Ok(self)
    }

    /// Parts within which hard tokens are selected.
    #[cfg(feature = "head")]
    pub(super) fn scopes(&self) -> usize {
        self.sequences.as_ref().map_or(1, |offsets| offsets.len() - 1)
    }

    /// True if the hard tokens, or what they are selected by, are known before any logits.
    #[cfg(feature = "head")]
    pub(super) fn knows_hard(&self) -> bool {
        self.hard.is_some() || self.margins.is_some()
    }

    /// The contexts of their memory, by what it holds.
    pub(super) fn contexts(&self) -> [(&'static str, Option<&CudaContext>); 6] {
        [
            ("the labels", self.labels.as_ref().map(DeviceLabels::context)),
            ("the sequences' offsets", self.sequences.as_ref().map(context_of)),
            ("the margins", self.margins.as_ref().map(context_of)),
            (HARD_MASK, self.hard.as_ref().map(context_of)),
            (TOKEN_WEIGHTS, self.token_weights.as_ref().map(context_of)),
            (TEMPERATURES, self.temperatures.as_ref().map(context_of)),
        ]
    }

    /// The addresses for work on `stream`, with that of an upstream gradient, and what must outlive the launches.
    pub(super) fn raw<'s>(
        &'s self,
        upstream: Option<&'s CudaView<f32>>,
        stream: &'s CudaStream,
    ) -> (RawTokens, [Option<SyncOnDrop<'s>>; 7]) {
        let (labels, of_labels) = self.labels.as_ref().map(|labels| labels.raw(stream)).unzip();
        let (offsets, of_offsets) =
            self.sequences.as_ref().map(|offsets| offsets.device_ptr(stream)).unzip();
        let count = self.sequences.as_ref().map_or(0, |offsets| offsets.len() - 1);
        let (margins, of_margins) =
            self.margins.as_ref().map(|margins| margins.device_ptr(stream)).unzip();
        let (hard, of_hard) = self.hard.as_ref().map(|hard| hard.device_ptr(stream)).unzip();
        let (token_weights, of_weights) =
            self.token_weights.as_ref().map(|weights| weights.device_ptr(stream)).unzip();
        let (temperatures, of_temperatures) =
            self.temperatures.as_ref().map(|own| own.device_ptr(stream)).unzip();
        let (upstream, of_upstream) = upstream.map(|upstream| upstream.device_ptr(stream)).unzip();
        let [tokens, vocab] = self.shape;
        let sequences = offsets.map(|address| (address, count));
        let raw = RawTokens {
            tokens,
            vocab,
            labels,
            sequences,
            margins,
            hard,
            token_weights,
            temperatures,
            upstream,
        };
        let guards =
            [of_labels, of_offsets, of_margins, of_hard, of_weights, of_temperatures, of_upstream];
        (raw, guards)
    }
}

pub(super) fn context_of<'a, T>(view: &'a CudaView<T>) -> &'a CudaContext {
    view.stream().context()
}

/// The teacher of a batch on the device: see [`Teacher`](crate::Teacher).
#[derive(Debug)]
pub enum DeviceTeacher<'a> {
    /// The logits of the whole vocabulary.
    Dense(DeviceLogits<'a>),
    /// The log-probabilities of some tokens of the vocabulary.
    Sparse(DeviceSparseTeacher<'a>),
}

impl DeviceTeacher<'_> {
    /// Tokens, and those of the vocabulary.
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(logits) => logits.shape,
            Self::Sparse(sparse) => sparse.shape,
        }
    }

    /// The contexts of its memory, by what it holds.
    pub(super) fn contexts(&self) -> Vec<(&'static str, &CudaContext)> {
        match self {
            Self::Dense(logits) => vec![("the teacher's logits", logits.context())],
            Self::Sparse(sparse) => {
                let target = sparse.target_log_probs.as_ref();
                let target = target.map(|own| (TARGET_LOG_PROBS, context_of(own)));
                let (indices, log_probs) = (&sparse.indices, &sparse.log_probs);
                let others = [(INDICES, indices.context()), (LOG_PROBS, log_probs.context())];
                others.into_iter().chain(target).collect()
            }
        }
    }
}

impl<'a> From<DeviceLogits<'a>> for DeviceTeacher<'a> {
    fn from(logits: DeviceLogits<'a>) -> Self {
        Self::Dense(logits)
    }
}

impl<'a> From<DeviceSparseTeacher<'a>> for DeviceTeacher<'a> {
    fn from(sparse: DeviceSparseTeacher<'a>) -> Self {
        Self::Sparse(sparse)
    }
}

/// A teacher on the device of which some log-probabilities per token are known: see [`SparseTeacher`]. [`Tail::Uniform`] is
/// the CPU's alone. A kernel checks the values: a token of whose teacher they are no distribution has the loss NaN, which is
/// an error of the next read.
#[derive(Debug)]
pub struct DeviceSparseTeacher<'a> {
    shape: [usize; 2],
    top_k: usize,
    indices: DeviceLabels<'a>,
    log_probs: DeviceElements<'a>,
    target_log_probs: Option<CudaView<'a, f32>>,
    target_rounding: Dtype,
    tail: Tail,
}

impl<'a> DeviceSparseTeacher<'a> {
    /// As [`SparseTeacher::new`].
    ///
    /// # Errors
    /// As there.
    pub fn new(
        indices: impl Into<DeviceLabels<'a>>,
        log_probs: impl Into<DeviceElements<'a>>,
        tokens: usize,
        top_k: usize,
        vocab: usize,
    ) -> Result<Self> {
        let (indices, log_probs) = (indices.into(), log_probs.into());
        SparseTeacher::check_shape([indices.len(), log_probs.len()], tokens, top_k, vocab)?;
        Ok(Self {
            shape: [tokens, vocab],
            top_k,
            indices,
            log_probs,
            target_log_probs: None,
            target_rounding: Dtype::F32,
            tail: Tail::default(),
        })
    }

    /// See [`SparseTeacher::with_target_log_probs`].
    ///
    /// # Errors
    /// As there.
    pub fn with_target_log_probs(mut self, log_probs: CudaView<'a, f32>) -> Result<Self> {
        check_count(TARGET_LOG_PROBS, log_probs.len(), self.shape[0])?;
        self.target_log_probs = Some(log_probs);
        Ok(self)
    }

    /// See [`SparseTeacher::with_target_rounding`].
    #[must_use]
    pub fn with_target_rounding(mut self, dtype: Dtype) -> Self {
        self.target_rounding = dtype;
        self
    }

    /// With another tail.
    #[must_use]
    pub fn with_tail(mut self, tail: Tail) -> Self {
        self.tail = tail;
        self
    }

    /// The addresses for work on `stream`, and what must outlive the launches.
    pub(super) fn raw<'s>(
        &'s self,
        stream: &'s CudaStream,
    ) -> (RawSparseTeacher, [Option<SyncOnDrop<'s>>; 3]) {
        let (indices, of_indices) = self.indices.raw(stream);
        let (log_probs, of_log_probs) = self.log_probs.address(stream);
        let (target_log_probs, of_target) =
            self.target_log_probs.as_ref().map(|own| own.device_ptr(stream)).unzip();
        let raw = RawSparseTeacher {
            top_k: self.top_k,
            indices,
            log_probs,
            dtype: self.log_probs.dtype(),
            target_log_probs,
            target_rounding: self.target_rounding,
            tail: self.tail,
        };
        (raw, [Some(of_indices), Some(of_log_probs), of_target])
    }
}

/// A batch of tokens on the device: see [`Batch`](crate::Batch).
#[derive(Debug)]
pub struct DeviceBatch<'a> {
    pub(super) teacher: DeviceTeacher<'a>,
    pub(super) tokens: DeviceTokens<'a>,
}

impl<'a> DeviceBatch<'a> {
    /// # Errors
    /// If there is not one label a token.
    pub fn new(
        teacher: impl Into<DeviceTeacher<'a>>,
        labels: impl Into<DeviceLabels<'a>>,
    ) -> Result<Self> {
        let teacher = teacher.into();
        let tokens = DeviceTokens::new(labels, teacher.shape()[1]);
        Self::of_tokens(teacher, tokens)
    }

    /// The teacher of tokens that have labels.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn of_tokens(
        teacher: impl Into<DeviceTeacher<'a>>,
        tokens: DeviceTokens<'a>,
    ) -> Result<Self> {
        let teacher = teacher.into();
        match [tokens.shape[0], teacher.shape()[0]] {
            [labels, tokens] if labels != tokens => Err(Error::LabelCount { labels, tokens }),
            _ => Ok(Self { teacher, tokens }),
        }
    }

    /// A batch without labels, for objectives with [`Target::Teacher`](crate::Target::Teacher).
    pub fn unlabelled(teacher: impl Into<DeviceTeacher<'a>>) -> Self {
        let teacher = teacher.into();
        let [tokens, vocab] = teacher.shape();
        Self { teacher, tokens: DeviceTokens::unlabelled(tokens, vocab) }
    }

    /// See [`DeviceTokens::with_sequences`].
    ///
    /// # Errors
    /// As there.
    pub fn with_sequences(self, offsets: CudaView<'a, i64>) -> Result<Self> {
        Ok(Self { tokens: self.tokens.with_sequences(offsets)?, ..self })
    }

    /// See [`DeviceTokens::with_margins`].
    ///
    /// # Errors
    /// As there.
    pub fn with_margins(self, margins: CudaView<'a, f32>) -> Result<Self> {
        Ok(Self { tokens: self.tokens.with_margins(margins)?, ..self })
    }

    /// See [`DeviceTokens::with_hard`].
    ///
    /// # Errors
    /// As there.
    pub fn with_hard(self, hard: CudaView<'a, u8>) -> Result<Self> {
        Ok(Self { tokens: self.tokens.with_hard(hard)?, ..self })
    }

    /// See [`DeviceTokens::with_temperatures`].
    ///
    /// # Errors
    /// As there.
    pub fn with_temperatures(self, temperatures: CudaView<'a, f32>) -> Result<Self> {
        Ok(Self { tokens: self.tokens.with_temperatures(temperatures)?, ..self })
    }

    /// See [`DeviceTokens::with_token_weights`].
    ///
    /// # Errors
    /// As there.
    pub fn with_token_weights(self, weights: CudaView<'a, f32>) -> Result<Self> {
        Ok(Self { tokens: self.tokens.with_token_weights(weights)?, ..self })
    }
}
