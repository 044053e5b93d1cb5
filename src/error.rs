use crate::objective::TEMPERATURE;
use crate::{Coefficient, Dtype, Strides};

/// Without the hundreds of zeros of very large and very small numbers.
fn readable(value: f64) -> String {
    let plain = value == 0.0 || (1e-5..1e16).contains(&value.abs());
    if plain { value.to_string() } else { format!("{value:e}") }
}

/// Everything that can be wrong with a call. Every message carries the numbers that explain it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Error {
    /// A setting of the [`Objective`](crate::Objective) outside its domain.
    #[error("{name} is {}, but must be {allowed}", readable(*.value))]
    Setting { name: &'static str, value: f64, allowed: &'static str },
    /// Means of the easy and of the hard tokens, of an objective that does not tell them apart.
    #[error(
        "the reduction is a mean for each group, but easy and hard tokens have the same coefficients, TKD {} and DKD {}, so that there are no groups: take the mean over all tokens, or an objective whose groups differ, such as atkd",
        coefficient(*tkd), coefficient(*dkd)
    )]
    NoGroups { tkd: Coefficient, dkd: Coefficient },
    /// A slice too short, or too long, for the shape that was given with it.
    #[error(
        "{} of {} with {strides} take {}, but the slice of {what} holds {actual}",
        count(*tokens, "token"), count(*vocab, "logit"), count(*expected, "element")
    )]
    Length {
        what: &'static str,
        expected: usize,
        tokens: usize,
        vocab: usize,
        strides: Strides,
        actual: usize,
    },
    /// A shape that no tensor can have.
    #[error(
        "the shape of {what} is impossible: {}, vocabulary {vocab}, {strides}; {reason}",
        count(*tokens, "token")
    )]
    Shape {
        what: &'static str,
        tokens: usize,
        vocab: usize,
        strides: Strides,
        reason: &'static str,
    },
    /// Teacher, student and gradient must be of one shape.
    #[error("the shape of {what} is [{}, {}], but that of the teacher's logits is [{}, {}]", .actual[0], .actual[1], .expected[0], .expected[1])]
    ShapeMismatch { what: &'static str, expected: [usize; 2], actual: [usize; 2] },
    /// A vocabulary that logits cannot have.
    #[error(
        "the vocabulary size is {vocab}, but must be from 1 to {columns}, the columns of the logits"
    )]
    Vocab { vocab: usize, columns: usize },
    /// Columns that logits do not have, or none.
    #[error(
        "columns {start}..{end} were asked for, but the logits have {columns}, and at least one must be taken"
    )]
    Columns { start: usize, end: usize, columns: usize },
    /// The gradient has a dtype that the student's logits do not allow.
    #[error(
        "the gradient is {actual}, but for {student} student logits it must be {student} or F32"
    )]
    GradientDtype { student: Dtype, actual: Dtype },
    /// One label per token, no more and no fewer.
    #[error("{} given for {}", were(*labels, "label"), count(*tokens, "token"))]
    LabelCount { labels: usize, tokens: usize },
    /// The objective's target is the label, but the batch has none.
    #[error(
        "the objective's target is the label of each token, but the batch has no labels; give labels or choose Target::Teacher"
    )]
    NoLabels,
    /// A label that names no token of the vocabulary.
    #[error(
        "the label of token {token} is {label}, but must be at least 0 and below the vocabulary size {vocab}, or ignore_index {ignore_index}"
    )]
    LabelOutOfRange { token: usize, label: i64, vocab: usize, ignore_index: i64 },
    /// The row offsets of the sequences do not partition the tokens.
    #[error("sequence offset {index} is {offset}, but {reason} ({})", count(*tokens, "token"))]
    Sequences { index: usize, offset: usize, tokens: usize, reason: &'static str },
    /// A sequence's offset below 0.
    #[error("sequence offset {index} is {offset}, but must not be negative")]
    NegativeOffset { index: usize, offset: i64 },
    /// No address where elements must be.
    #[error("the address of {what} is null, but {} announced", were(*elements, "element"))]
    Null { what: &'static str, elements: usize },
    /// An instruction set was asked for that the machine does not have.
    #[error("{variable} is {name:?}, but this machine has {available}")]
    Instructions { variable: &'static str, name: String, available: String },
    /// More than can be counted: by the kernels or, of sequences, anywhere.
    #[error("{what} is {value}, but must be at most {most}")]
    TooLarge { what: &'static str, value: usize, most: usize },
    /// An address that no element of this type can have.
    #[error(
        "the address of {what} is {address:#x}, which is no multiple of an element's {multiple} bytes"
    )]
    Unaligned { what: &'static str, address: u64, multiple: u64 },
    /// The gradient would overwrite what is still to be read. Only exactly over the student's logits is
    /// safe.
    #[error(
        "the gradient at {:#x}..{:#x} overlaps {what} at {:#x}..{:#x}; it must lie apart, or exactly over the student's logits",
        .gradient[0], .gradient[1], .other[0], .other[1]
    )]
    Overlap { what: &'static str, gradient: [u64; 2], other: [u64; 2] },
    /// A workspace made for less.
    #[error("the call has {needed} {what}, but its workspace was made for {capacity}")]
    Workspace { what: &'static str, needed: usize, capacity: usize },
    /// A label that names no token of the vocabulary, met by a kernel. The token was dropped.
    #[error(
        "the label of token {token} is out of range: it must be at least 0 and below the vocabulary size {vocab}, or ignore_index {ignore_index}; a kernel met it, and dropped the token"
    )]
    DeviceLabel { token: u64, vocab: usize, ignore_index: i64 },
    /// Values of a sparse teacher that are no distribution's, met by a kernel. The token's loss is NaN.
    #[error(
        "the teacher's values of token {token} are no log-probabilities of different tokens: indices must be at least 0 and below the vocabulary size {vocab}, or -1, none twice, the target known, and the probabilities must add up to 1 at most; a kernel met them, and made the token's loss NaN"
    )]
    DeviceTeacher { token: u64, vocab: usize },
    /// A shard with columns that the vocabulary does not have.
    #[error(
        "the shard has {} from {first} on, but the vocabulary has {vocab} tokens",
        count(*columns, "column")
    )]
    ShardColumns { first: usize, columns: usize, vocab: usize },
    /// Nothing was exchanged.
    #[error(
        "there are no row states to merge: give those of each rank, in the order of the columns"
    )]
    NoStates,
    /// One row state per rank and token, and as many of the second sweep's terms.
    #[error(
        "there are {values} of {what} for {}, but there must be one per rank and token, such as {expected}",
        count(*tokens, "token")
    )]
    StateCount { what: &'static str, values: usize, expected: usize, tokens: usize },
    /// A sparse teacher's own target, of which the logits that its tail makes may have a larger one.
    #[error(
        "the target is the teacher's, which shards of a sparse teacher do not know: give the likeliest of each token's indices as its label, and its log-probability as the target's"
    )]
    ShardOfTeacherTarget,
    /// A token whose target no shard has left out.
    #[error(
        "no shard has the target of token {token}: the row states must be of all ranks, whose columns are the whole vocabulary, and each rank's labels the same, tokens of that vocabulary"
    )]
    NoShardTarget { token: usize },
    /// The gradients or the terms of shards depend on hard tokens that are not given.
    #[error(
        "the objective depends on which tokens are hard, and shards have no selection: give the mask that select_hard makes of the margins of all ranks' tokens"
    )]
    NoHardTokens,
    /// A communicator that works on another stream than the call.
    #[error("a communicator of the call has another stream than the call: make both with one")]
    OtherStream,
    /// The numbers of tokens of all ranks, of which this one has another.
    #[error(
        "rank {rank} of {size} has {}, but the counts, {given} of them, say {told}: there must be one for each rank, and this rank's its own",
        count(*tokens, "token")
    )]
    RankTokens { rank: usize, tokens: usize, told: usize, given: usize, size: usize },
    /// Hard tokens that were selected elsewhere, among the tokens of several ranks.
    #[error(
        "the hard tokens of one of {size} ranks are given, but not how many tokens of all count and are hard: give both as the shard's counts"
    )]
    NoCounts { size: usize },
    /// NCCL refused.
    #[error("{what}: NCCL reports status {status}")]
    Nccl { what: &'static str, status: u32 },
    /// A divergence of two sweeps whose second sweep was not exchanged.
    #[error("the divergence needs the second sweep's terms of all ranks beside their row states")]
    NoSweepTerms,
    /// A divergence of one sweep has no second one.
    #[error("the divergence has no second sweep, whose terms were asked for")]
    NoSecondSweep,
    /// Row offsets that do not partition the tokens, met by a kernel.
    #[error(
        "the row offsets of sequence {sequence} are out of order: offsets must start at 0, never fall, and end at the number of tokens; a kernel met it, and selected no hard tokens there"
    )]
    DeviceSequences { sequence: u64 },
    /// One margin a token, no more and no fewer.
    #[error("{} given for {}", were(*margins, "margin"), count(*tokens, "token"))]
    MarginCount { margins: usize, tokens: usize },
    /// A token's own temperature outside its domain.
    #[error("the temperature of token {token} is {}, but must be {TEMPERATURE}", readable((*temperature).into()))]
    Temperature { token: usize, temperature: f32 },
    /// One value per token, no more and no fewer.
    #[error("{values} values of {what} were given for {tokens} tokens")]
    MaskCount { what: &'static str, values: usize, tokens: usize },
    /// A log-probability above 0 by more than rounding makes it.
    #[error(
        "the teacher's log-probability of token {token} is {log_prob}, but a probability is at most 1"
    )]
    LogProb { token: usize, log_prob: f32 },
    /// A sparse teacher where logits are needed.
    #[error(
        "the batch has a sparse teacher, log-probabilities of some tokens, where the logits of all tokens are needed: on a device a sparse teacher has the loss of whole rows alone, and all else is the cpu module's"
    )]
    NoTeacherLogits,
    /// More of a teacher's tokens than a row may have, or none.
    #[error("a sparse teacher has {top_k} tokens in a row, but must have from 1 to {most}")]
    TopK { top_k: usize, most: usize },
    /// A sparse teacher's values are not as many as its shape says.
    #[error(
        "{actual} of {what} were given for {} of {top_k}: there must be {expected}",
        count(*tokens, "token")
    )]
    SparseLength { what: &'static str, actual: usize, expected: usize, tokens: usize, top_k: usize },
    /// An index of a sparse teacher that names no token of the vocabulary.
    #[error(
        "index {place} of the teacher's token {token} is {index}, but must be at least 0 and below the vocabulary size {vocab}, or -1 for none"
    )]
    SparseIndex { token: usize, place: usize, index: i64, vocab: usize },
    /// An index that a sparse teacher has twice.
    #[error("the teacher's token {token} has index {index} twice, at {} and at {}", .places[0], .places[1])]
    SparseDuplicate { token: usize, index: usize, places: [usize; 2] },
    /// A log-probability that is NaN or +inf.
    #[error("log-probability {place} of the teacher's token {token} is {log_prob}")]
    SparseLogProb { token: usize, place: usize, log_prob: f32 },
    /// Probabilities whose sum is more than rounding makes of 1.
    #[error(
        "the teacher's probabilities of token {token} add up to {mass}, which is more than 1 by more than the {tolerance} that rounding to {dtype} allows: give log-probabilities (natural logarithms, at the temperature of the call), not logits"
    )]
    SparseMass { token: usize, mass: f64, tolerance: f64, dtype: Dtype },
    /// A row that tail zero would renormalise, without any mass.
    #[error(
        "the teacher's probabilities of token {token}, its target's among them, are all 0, which tail zero cannot renormalise: take tail bucket or uniform, or ignore the token"
    )]
    SparseNoMass { token: usize },
    /// A row of the whole vocabulary, whose probabilities leave something.
    #[error(
        "the teacher's probabilities of token {token} add up to {mass}, which is less than 1 by more than the {tolerance} that rounding to {dtype} allows, but they are those of the whole vocabulary of {vocab}: nothing is left to have the rest; give all of the mass, or take tail zero, which renormalises"
    )]
    SparseMassMissing { token: usize, mass: f64, tolerance: f64, dtype: Dtype, vocab: usize },
    /// A row of draws without any.
    #[error(
        "the teacher's token {token} has no draw but its target, whose log-probability is {log_prob}: draw from all tokens but the target; or take tail zero, plain forward KL and the teacher's target, which need no label among the draws"
    )]
    SparseNoDraws { token: usize, log_prob: f32 },
    /// Draws without the probability of the targets.
    #[error(
        "tail sampled weighs draws against the exact log-probability of each label: give the targets' log-probabilities, and take the label for the target"
    )]
    SampledTarget,
    /// A divergence whose gradient draws do not estimate.
    #[error(
        "of draws the gradient by forward KL alone has the expectation of the whole teacher's: take that divergence, or an objective of the targets' probabilities alone, such as tkd"
    )]
    SampledDivergence,
    /// A logit of a teacher's row that is none.
    #[error("the logit of {index} is {logit}, but must be finite or -inf")]
    TeacherLogit { index: usize, logit: f32 },
    /// A teacher's row without a distribution.
    #[error("all logits of the row are -inf, but one at least must be finite")]
    NoTeacherMass,
    /// A target that is no token of a teacher's row.
    #[error("the target is {target}, but must be below the vocabulary size {vocab}")]
    TeacherTarget { target: usize, vocab: usize },
    /// A target of which a sparse teacher knows nothing.
    #[error(
        "the teacher's token {token} has no probability for its target {target}, which is not among its {top_k} indices: give the target's log-probabilities"
    )]
    SparseTarget { token: usize, target: usize, top_k: usize },
    /// A row without any index, whose arg max was wanted.
    #[error(
        "the teacher's token {token} has no likeliest token: all of its {top_k} indices are -1"
    )]
    SparseEmpty { token: usize, top_k: usize },
    /// Reverse KL from a teacher that has no probability outside of the tokens it knows.
    #[error(
        "reverse KL is infinite where the teacher has no probability, which by tail zero is everywhere outside of the tokens it knows: take tail bucket or uniform, another divergence, or an objective of the targets' probabilities alone, such as tkd"
    )]
    ReverseKlOfZeroTail,
    /// A tail that the CUDA kernels do not have.
    #[error(
        "the CUDA kernels have no tail uniform: take tail bucket, zero or sampled, or compute on the CPU"
    )]
    NoUniformTail,
    /// Hidden states or a weight that are no rows of so many features.
    #[error("{} given for {what}, but must be one or more rows of the hidden size {features}", were(*elements, "element"))]
    HiddenSize { what: &'static str, elements: usize, features: usize },
    /// A bias or a gradient that does not fit its layer.
    #[error("{} given for {what}, but must be {expected}: {rule}", were(*elements, "element"))]
    LayerLength { what: &'static str, elements: usize, expected: usize, rule: &'static str },
    /// A layer of other tokens, or of another vocabulary, than the call.
    #[error("{what} has {actual} {of}, but the call has {expected}{hint}")]
    LayerMismatch {
        what: &'static str,
        of: &'static str,
        actual: usize,
        expected: usize,
        hint: &'static str,
    },
    /// A range that reaches beyond a call's tokens.
    #[error("{} from token {first} on reach beyond the call's {tokens}", self::count(*count, "token"))]
    TokenRange { first: usize, count: usize, tokens: usize },
    /// A token of a call in stages that is not at the stage that it was handed over to.
    #[error("token {token} {problem}")]
    Stage { token: usize, problem: &'static str },
    /// An upstream gradient that is no scalar.
    #[error("the upstream gradient has {actual} elements, but must be a scalar: 1")]
    Upstream { actual: usize },
    /// The driver's library is not on this machine.
    #[error(
        "no NVIDIA driver was found: the library libcuda is not on this machine, or not where LD_LIBRARY_PATH says"
    )]
    NoDriver,
    /// A device that is not there.
    #[error("there is no device {ordinal}: the driver has {devices}")]
    NoDevice { ordinal: usize, devices: usize },
    /// A device of before Ampere.
    #[error("the device has compute capability {major}.{minor}, but the kernels need 8.0 or later")]
    OldDevice { major: i32, minor: i32 },
    /// A build without kernels.
    #[error("{hint}")]
    NoKernels { hint: &'static str },
    /// Memory, or a stream, of another context than the kernels'.
    #[error(
        "the context of {what} (device {actual}) is another than that of the kernels (device {expected})"
    )]
    OtherContext { what: &'static str, expected: usize, actual: usize },
    /// A stream that is being captured while cudarc tracks the use of memory with events.
    #[error(
        "the stream is being captured into a graph while cudarc tracks the use of memory across streams; call CudaContext::disable_event_tracking before the memory is allocated, or enqueue by address with Workspace::launch"
    )]
    TrackedCapture,
    /// A repair of a call in stages on a stream that is being captured into a graph.
    #[error(
        "a repair copies the numbers of its tokens from the host, which a captured graph cannot do again; end the capture first, or select the hard tokens before the rows, so that none needs a repair"
    )]
    CapturedRepair,
    /// A `cuda::Head` on a stream that is being captured into a graph.
    #[error(
        "a head copies from the host and allocates, which a captured graph cannot do again; end the capture first, or capture the loss of the logits"
    )]
    CapturedHead,
    /// A kernel did in the simulator what it must not, or the system did not give what the simulator needs.
    #[error("the simulator of the CUDA kernels: {message}")]
    Simulation { message: String },
    /// A workspace whose last call failed on its way.
    #[error(
        "there is no loss to read: the driver refused a kernel of the workspace's last call, whose error said why"
    )]
    FailedCall,
    /// The library that multiplies matrices on a GPU is not on this machine.
    #[error(
        "no cuBLASLt was found, which multiplies hidden states and weights: neither libcublasLt.so of a CUDA toolkit nor libcublasLt.so.12 is on this machine, or not where LD_LIBRARY_PATH says"
    )]
    NoCublas,
    /// Hidden states and their weight, or their gradient, have dtypes that a GPU does not multiply.
    #[error("the dtype of {what} is {actual}, but must be {expected}")]
    LayerDtype { what: &'static str, actual: Dtype, expected: String },
    /// cuBLASLt reports an error.
    #[error("cuBLASLt, which multiplies hidden states and weights, reports error {status}, {name}")]
    Cublas { status: u32, name: String },
    /// The driver reports an error.
    #[error("{doing}: the CUDA driver reports error {code}, {message}")]
    Driver { doing: &'static str, code: u32, message: String },
}

fn coefficient(of: Coefficient) -> String {
    match of {
        Coefficient::Constant(value) => readable(value),
        Coefficient::Uncertainty => "UNC".into(),
    }
}

/// The fault, in [`Error::Stage`], of rows whose gradient is divided by the size of a group that is not known.
pub(crate) const NO_GROUP_SIZES: &str = "has a gradient that is divided by the size of its group: with means of groups, and a selection by the median or within sequences, margins of all tokens and the selection come before the rows, unless hard tokens or margins are given";

/// "1 token", "2 tokens".
fn count(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

/// "1 token was", "2 tokens were".
fn were(number: usize, one: &str) -> String {
    format!("{} {}", count(number, one), if number == 1 { "was" } else { "were" })
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
