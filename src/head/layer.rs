//! Layers, the gradients that are wanted of one, and chunks of tokens: what calls on the host and on a device have in
//! common.

#[cfg(feature = "cuda")]
use cudarc::driver::CudaViewMut;

#[cfg(feature = "cuda")]
use crate::cuda::{DeviceElements, DeviceElementsMut};
use crate::{Elements, ElementsMut, Error, Result};

/// Elements, on the host or on a device.
pub trait Memory {
    /// How many.
    fn length(&self) -> usize;
}

macro_rules! memory {
    ($($name:ty),+) => {
        $(impl Memory for $name {
            fn length(&self) -> usize {
                self.len()
            }
        })+
    };
}

memory!(Elements<'_>, &mut [f32]);
#[cfg(feature = "cuda")]
memory!(DeviceElements<'_>, DeviceElementsMut<'_>, CudaViewMut<'_, f32>);

impl Memory for ElementsMut<'_> {
    fn length(&self) -> usize {
        self.as_ref().len()
    }
}

/// A model's last layer and what it multiplies: hidden states `[tokens, hidden size]`, a weight `[vocab, hidden size]` and
/// perhaps a bias `[vocab]`, all contiguous, each of a dtype of its own.
#[derive(Clone, Copy, Debug)]
pub struct LayerOf<E> {
    pub(crate) hidden: E,
    pub(crate) weight: E,
    pub(crate) bias: Option<E>,
    pub(crate) features: usize,
    pub(crate) vocab: usize,
}

impl<E: Memory> LayerOf<E> {
    /// The layer, without a bias.
    ///
    /// # Errors
    /// If the hidden size is 0, or one of the slices is no whole rows of it. The weight must have at least one.
    pub fn new(hidden: impl Into<E>, weight: impl Into<E>, hidden_size: usize) -> Result<Self> {
        let (hidden, weight, features) = (hidden.into(), weight.into(), hidden_size);
        at_least_1("the hidden size", features)?;
        for (what, elements) in
            [("the hidden states", hidden.length()), ("the weight", weight.length())]
        {
            let is_missing = elements == 0 && what == "the weight";
            if is_missing || !elements.is_multiple_of(features) {
                return Err(Error::HiddenSize { what, elements, features });
            }
        }
        let vocab = weight.length() / features;
        Ok(Self { hidden, weight, bias: None, features, vocab })
    }

    /// Adds a bias, one number per row of the weight.
    ///
    /// # Errors
    /// If there are more numbers, or fewer.
    pub fn with_bias(mut self, bias: impl Into<E>) -> Result<Self> {
        let bias = bias.into();
        check_length("the bias", bias.length(), self.rows(), "one for each row of the weight")?;
        self.bias = Some(bias);
        Ok(self)
    }

    /// The first `vocab` rows of the weight alone, where a model's vocabulary is padded: nothing is computed of the others,
    /// and their gradient is 0.
    ///
    /// # Errors
    /// If `vocab` is 0, or more than there are.
    pub fn with_vocab(mut self, vocab: usize) -> Result<Self> {
        if vocab == 0 || vocab > self.rows() {
            return Err(Error::Vocab { vocab, columns: self.rows() });
        }
        self.vocab = vocab;
        Ok(self)
    }

    /// Tokens, which are the rows of the hidden states.
    pub fn tokens(&self) -> usize {
        self.hidden.length() / self.features
    }

    /// The size of the vocabulary, without padding.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Rows of the weight, padding included.
    pub(crate) fn rows(&self) -> usize {
        self.weight.length() / self.features
    }

    pub(crate) fn check(&self, what: &'static str, [tokens, vocab]: [usize; 2]) -> Result<()> {
        const PADDING: &str = "; Layer::with_vocab leaves out rows of a weight that are padding";
        for (of, actual, expected, hint) in [
            ("tokens", self.tokens(), tokens, ""),
            ("entries of the vocabulary", self.vocab, vocab, PADDING),
        ] {
            if actual != expected {
                return Err(Error::LayerMismatch { what, of, actual, expected, hint });
            }
        }
        Ok(())
    }
}

/// The gradients of the student's layer that are wanted, times the objective's upstream gradient. What they hold is
/// overwritten.
#[derive(Debug)]
pub struct GradientsOf<E, F> {
    /// That of the hidden states, `[tokens, hidden size]`, of any dtype: each element is rounded once from float32.
    pub hidden: Option<E>,
    /// That of the weight, shaped as it, the rows of padding included, which get 0.
    pub weight: Option<F>,
    /// That of the bias, one per row of the weight.
    pub bias: Option<F>,
}

impl<E, F> Default for GradientsOf<E, F> {
    /// None.
    fn default() -> Self {
        Self { hidden: None, weight: None, bias: None }
    }
}

impl<E: Memory, F: Memory> GradientsOf<E, F> {
    pub(crate) fn check(&self, layer: &LayerOf<impl Memory>) -> Result<()> {
        let Self { hidden, weight, bias } = self;
        let lengths = [
            (
                "the gradient of the hidden states",
                hidden.as_ref().map(Memory::length),
                layer.hidden.length(),
                "as many as the student's hidden states",
            ),
            (
                "the gradient of the weight",
                weight.as_ref().map(Memory::length),
                layer.weight.length(),
                "as many as the student's weight",
            ),
            (
                "the gradient of the bias",
                bias.as_ref().map(Memory::length),
                layer.rows(),
                "one for each row of the student's weight",
            ),
        ];
        for (what, elements, expected, rule) in lengths {
            check_length(what, elements.unwrap_or(expected), expected, rule)?;
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.hidden.is_none() && !self.adds_up()
    }

    /// True if sums over the tokens are wanted.
    pub(crate) fn adds_up(&self) -> bool {
        self.weight.is_some() || self.bias.is_some()
    }
}

/// How many tokens have logits at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// The tokens that have logits of both models in so many bytes, on a device with gradients beside them; at least one.
    Memory(usize),
    /// So many.
    Tokens(usize),
}

impl Default for Chunks {
    /// 512 MB.
    fn default() -> Self {
        Self::Memory(512 << 20)
    }
}

impl Chunks {
    /// The tokens of a chunk, each of which takes so many bytes.
    pub(crate) fn tokens(self, bytes: usize) -> Result<usize> {
        match self {
            Self::Tokens(tokens) => at_least_1("the number of tokens of a chunk", tokens),
            Self::Memory(all) => {
                Ok((at_least_1("the memory of a chunk, in bytes,", all)? / bytes).max(1))
            }
        }
    }
}

fn at_least_1(name: &'static str, value: usize) -> Result<usize> {
    match value {
        0 => Err(Error::Setting { name, value: 0.0, allowed: "at least 1" }),
        _ => Ok(value),
    }
}

fn check_length(
    what: &'static str,
    elements: usize,
    expected: usize,
    rule: &'static str,
) -> Result<()> {
    if elements == expected {
        return Ok(());
    }
    Err(Error::LayerLength { what, elements, expected, rule })
}
