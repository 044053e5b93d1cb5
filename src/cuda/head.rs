//! The loss behind the models' last layers.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice,
    SyncOnDrop, result,
};
use half::{bf16, f16};

use super::products::{Matrix, Products};
use super::session::{Session, repair};
use super::{
    DeviceElements, DeviceElementsMut, DeviceTokens, RawLogits, RawRows, Workspace, driver,
};
use crate::head::{Chunks, GradientsOf, LayerOf};
use crate::{Dtype, Error, Objective, Reduction, Result};

/// A layer on the device. Its hidden states and its weight are of one dtype.
pub type DeviceLayer<'a> = LayerOf<DeviceElements<'a>>;

/// The gradients of a layer on the device. That of the hidden states is of their dtype or float32.
pub type DeviceGradients<'a> = GradientsOf<DeviceElementsMut<'a>, CudaViewMut<'a, f32>>;

/// [`head::loss`](crate::head::loss) on a GPU: hidden states and weights go in, the loss and the gradients of the student's
/// hidden states, weight and bias come out, and logits of all tokens never exist. The products are cuBLASLt's, which is
/// found when a head is made.
///
/// The logits are float32, whatever the dtype of the layers; their gradient is of the student's dtype, by which it is
/// multiplied, with sums in float32. A chunk is a range of tokens. The hard tokens are predicted by the threshold that the
/// last call left in the workspace, the tokens whose prediction was wrong are computed again, and the weight's gradient gets
/// the difference: the selection is exact. Where the last call left none, as before the first one, the teacher's logits are
/// computed twice.
///
/// Beyond the arguments, the workspace and 32 MB of its own a head takes for a call what [`Chunks`] says: the float32 logits
/// of both models and, beside them, gradients that wait to be multiplied at once, in half precision those of four chunks,
/// since each product reads and writes all of the weight's gradient. And where tokens are computed again, hidden states of
/// as many as a chunk has. A bias costs a pass more over the logits.
///
/// In float16 what is below 6e-8 is lost: the gradients of a mean, or over a denominator, are multiplied by a power of two
/// near their number of tokens, 1024 at most, until they are float32. Weights of tokens much below 1 are the caller's to
/// avoid.
///
/// Ignored tokens are known to the device alone, so that their hidden states are multiplied too, by gradients of 0: those
/// must be finite. As on the CPU, a gradient that is not finite for the predicted group stays in those of weight and bias.
///
/// ```no_run
/// use atkd::cuda::{self, DeviceGradients, DeviceLayer, DeviceTokens, Head, Kernels, Workspace};
/// use atkd::Objective;
/// use half::bf16;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let context = cuda::context(0)?;
/// let stream = context.default_stream();
/// let (tokens, vocab, size) = (8192, 128_256, 4096);
/// let mut workspace = Workspace::new(&Kernels::load(&context)?, &stream, tokens)?;
/// let mut head = Head::new(&stream)?;
///
/// let weights = [stream.alloc_zeros::<bf16>(vocab * size)?, stream.alloc_zeros(vocab * size)?];
/// let hidden = [stream.alloc_zeros::<bf16>(tokens * size)?, stream.alloc_zeros(tokens * size)?];
/// let labels = stream.alloc_zeros::<i64>(tokens)?;
/// let student = DeviceLayer::new(&hidden[0], &weights[0], size)?;
/// let teacher = DeviceLayer::new(&hidden[1], &weights[1], size)?;
/// let mut of_hidden = stream.alloc_zeros::<bf16>(tokens * size)?;
/// let mut of_weight = stream.alloc_zeros::<f32>(vocab * size)?;
/// let gradients = DeviceGradients {
///     hidden: Some((&mut of_hidden).into()),
///     weight: Some(of_weight.as_view_mut()),
///     bias: None,
/// };
/// let tokens = DeviceTokens::new(&labels, vocab);
/// let objective = Objective::default();
/// let workspace = head.loss(&mut workspace, &objective, tokens, &student, &teacher, gradients)?;
/// println!("loss {}", workspace.read_loss(&stream)?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Head {
    products: Products,
    chunks: Chunks,
}

impl Head {
    /// A head whose calls are enqueued on this stream, with the default [`Chunks`].
    ///
    /// # Errors
    /// If there is no cuBLASLt, or it or the driver refuses.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self { products: Products::new(stream)?, chunks: Chunks::default() })
    }

    /// With chunks of another size.
    pub fn with_chunks(self, chunks: Chunks) -> Self {
        Self { chunks, ..self }
    }

    /// Computes the loss, each token's terms, and the gradients that are wanted, times the objective's upstream gradient.
    /// Returns the workspace, which has the results. Waits for the selection where gradients depend on it.
    ///
    /// # Errors
    /// If layers or gradients do not fit the tokens or each other in shape, dtype or context, a chunk would have no token,
    /// the capacity does not suffice, the stream is being captured, or the driver or cuBLASLt refuses.
    pub fn loss<'w>(
        &mut self,
        workspace: &'w mut Workspace,
        objective: &Objective,
        tokens: DeviceTokens<'w>,
        student: &DeviceLayer,
        teacher: &DeviceLayer,
        mut gradients: DeviceGradients,
    ) -> Result<&'w mut Workspace> {
        let shape @ [count, vocab] = tokens.shape;
        student.check("the student's layer", shape)?;
        teacher.check("the teacher's layer", shape)?;
        gradients.check(student)?;
        check_dtypes(student, teacher, gradients.hidden.as_ref())?;
        let stream = &self.products.stream().clone();
        workspace.check(stream, &tokens, contexts(student, teacher, &gradients), None)?;
        let status = stream.capture_status().map_err(driver("asking for the stream's state"))?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Err(Error::CapturedHead);
        }

        let with_gradient = !gradients.is_empty();
        let needs_sizes = objective.selects_before_gradients(tokens.scopes());
        let predicts = objective.depends_on_selection() && !tokens.knows_hard();
        let selects_first = with_gradient && predicts && (needs_sizes || !workspace.can_predict());
        let dtype = student.weight.dtype();
        let waiting = match dtype {
            _ if !with_gradient => 0,
            Dtype::F32 => 1,
            Dtype::F16 | Dtype::Bf16 => 4,
        };
        // Rows that start at multiples of 128 bytes.
        let row = vocab.next_multiple_of(64);
        let chunk = self.chunks.tokens(row * (8 + waiting * dtype.size()))?.min(count);
        let waiting = (waiting * chunk).min(count);
        let unit = gradient_unit(objective, count, dtype);
        let scaled = objective.with_upstream_gradient(unit)?;

        let rows = student.rows();
        let (student, _student) = Model::new(student, stream);
        let (teacher, _teacher) = Model::new(teacher, stream);
        let (to, _gradients) = Addresses::new(&mut gradients, student, stream);
        let student = WithLogits::new(student, stream, [chunk, vocab, row])?;
        let teacher = WithLogits::new(teacher, stream, [chunk, vocab, row])?;
        let gradient = Buffer::new(stream, dtype, [waiting, vocab, row])?;
        let ones = Buffer::ones(stream, dtype, if to.bias.is_some() { waiting } else { 0 })?;
        let mut call = Call {
            products: &mut self.products,
            session: workspace.begin(stream, &scaled, tokens, None)?,
            factor: (objective.upstream_gradient() / unit) as f32,
            student,
            teacher,
            gradient,
            ones,
            to,
            waiting: 0..0,
            is_first: true,
        };
        call.clear_padding(if count == 0 { 0 } else { vocab }, rows)?;
        let chunks = (0..count).step_by(chunk.max(1)).map(|first| first..count.min(first + chunk));
        if selects_first {
            for tokens in chunks.clone() {
                call.margins(tokens)?;
            }
            call.session.select()?;
        }
        for tokens in chunks {
            call.rows(tokens, with_gradient)?;
        }
        call.multiply_waiting()?;
        for tokens in call.session.select()?.chunks(chunk.max(1)) {
            call.repair(tokens)?;
        }
        call.session.finish()
    }
}

/// The factor by which gradients are larger between the rows and the products: float16 loses what is below 6e-8, and the
/// gradient of a mean is about one over the number of tokens. A power of two, so that it rounds nothing, and at most 1024, so
/// that the gradient of one valid token of many has room up to 64.
fn gradient_unit(objective: &Objective, tokens: usize, dtype: Dtype) -> f64 {
    let over = match objective.reduction() {
        Reduction::Sum => 1.0,
        Reduction::Mean | Reduction::GroupMean => tokens.max(1) as f64,
        Reduction::Denominator(denominator) => denominator,
    };
    match dtype {
        Dtype::F16 => over.min(1024.0).log2().floor().exp2(),
        Dtype::F32 | Dtype::Bf16 => 1.0,
    }
}

fn check_dtypes(
    student: &DeviceLayer,
    teacher: &DeviceLayer,
    gradient: Option<&DeviceElementsMut>,
) -> Result<()> {
    let of_weight = |what, actual: Dtype, weight: Dtype| match actual == weight {
        true => Ok(()),
        false => {
            Err(Error::LayerDtype { what, actual, expected: format!("{weight}, as their weight") })
        }
    };
    of_weight("the student's hidden states", student.hidden.dtype(), student.weight.dtype())?;
    of_weight("the teacher's hidden states", teacher.hidden.dtype(), teacher.weight.dtype())?;
    let (what, layer) = ("the gradient of the hidden states", student.hidden.dtype());
    match gradient.map(DeviceElementsMut::dtype) {
        Some(actual) if actual != Dtype::F32 && actual != layer => {
            Err(Error::LayerDtype { what, actual, expected: format!("{layer}, as they, or F32") })
        }
        _ => Ok(()),
    }
}

/// The contexts of all memory, by what it holds.
fn contexts<'a>(
    student: &'a DeviceLayer,
    teacher: &'a DeviceLayer,
    gradients: &'a DeviceGradients,
) -> impl Iterator<Item = (&'static str, &'a CudaContext)> {
    let all = [
        ("the student's hidden states", Some(student.hidden.context())),
        ("the student's weight", Some(student.weight.context())),
        ("the student's bias", student.bias.as_ref().map(DeviceElements::context)),
        ("the teacher's hidden states", Some(teacher.hidden.context())),
        ("the teacher's weight", Some(teacher.weight.context())),
        ("the teacher's bias", teacher.bias.as_ref().map(DeviceElements::context)),
        (
            "the gradient of the hidden states",
            gradients.hidden.as_ref().map(DeviceElementsMut::context),
        ),
        ("the gradient of the weight", gradients.weight.as_ref().map(context_of_mut)),
        ("the gradient of the bias", gradients.bias.as_ref().map(context_of_mut)),
    ];
    all.into_iter().filter_map(|(what, context)| Some((what, context?)))
}

fn context_of_mut<'a>(view: &'a CudaViewMut<f32>) -> &'a CudaContext {
    view.stream().context()
}

/// A layer's matrices.
#[derive(Clone, Copy)]
struct Model {
    hidden: Matrix,
    weight: Matrix,
    bias: Option<Matrix>,
}

impl Model {
    /// The matrices, and what lets the memory's owners wait for the stream.
    fn new<'a>(
        layer: &'a DeviceLayer,
        stream: &'a CudaStream,
    ) -> (Self, (SyncOnDrop<'a>, SyncOnDrop<'a>, Option<SyncOnDrop<'a>>)) {
        let LayerOf { hidden, weight, bias, features, vocab } = layer;
        let (at_hidden, of_hidden) = hidden.address(stream);
        let (at_weight, of_weight) = weight.address(stream);
        let (bias, of_bias) = bias
            .as_ref()
            .map(|bias| {
                let (address, guard) = bias.address(stream);
                (Matrix::new(address, bias.dtype(), [1, *vocab]), guard)
            })
            .unzip();
        let model = Self {
            hidden: Matrix::new(at_hidden, hidden.dtype(), [layer.tokens(), *features]),
            weight: Matrix::new(at_weight, weight.dtype(), [*vocab, *features]),
            bias,
        };
        (model, (of_hidden, of_weight, of_bias))
    }
}

/// Memory of this stream, and the matrix that lies there.
struct Buffer {
    /// It is freed with this.
    _memory: CudaSlice<u8>,
    matrix: Matrix,
}

impl Buffer {
    /// Rows that start `row` elements after each other.
    fn new(
        stream: &Arc<CudaStream>,
        dtype: Dtype,
        [rows, columns, row]: [usize; 3],
    ) -> Result<Self> {
        // SAFETY: what is read of it is written before. The driver refuses to allocate nothing.
        let memory = unsafe { stream.alloc((rows * row * dtype.size()).max(1)) };
        let memory = memory.map_err(driver("allocating memory for a chunk of tokens"))?;
        let (address, guard) = memory.device_ptr(stream);
        drop(guard);
        let matrix = Matrix { row, ..Matrix::new(address, dtype, [rows, columns]) };
        Ok(Self { _memory: memory, matrix })
    }

    /// `[1, count]` ones.
    fn ones(stream: &Arc<CudaStream>, dtype: Dtype, count: usize) -> Result<Self> {
        let buffer = Self::new(stream, dtype, [1, count, count])?;
        let bytes = match dtype {
            Dtype::F32 => 1.0_f32.to_ne_bytes().repeat(count),
            Dtype::F16 => f16::ONE.to_ne_bytes().repeat(count),
            Dtype::Bf16 => bf16::ONE.to_ne_bytes().repeat(count),
        };
        if count > 0 {
            // SAFETY: so many bytes are there. The driver takes pageable memory before it returns.
            unsafe { result::memcpy_htod_async(buffer.matrix.address, &bytes, stream.cu_stream()) }
                .map_err(driver("writing a vector of ones"))?;
        }
        Ok(buffer)
    }
}

/// A layer, and memory for what a chunk of its tokens takes.
struct WithLogits {
    model: Model,
    logits: Buffer,
    /// `[1, chunk]`, of the bias's dtype.
    ones: Option<Buffer>,
    /// The hidden states of tokens that are computed again.
    gathered: Option<Buffer>,
}

impl WithLogits {
    fn new(
        model: Model,
        stream: &Arc<CudaStream>,
        shape @ [chunk, ..]: [usize; 3],
    ) -> Result<Self> {
        let ones = model.bias.map(|bias| Buffer::ones(stream, bias.dtype, chunk)).transpose()?;
        let logits = Buffer::new(stream, Dtype::F32, shape)?;
        Ok(Self { model, logits, ones, gathered: None })
    }

    /// The hidden states of these tokens, side by side.
    fn gather(&mut self, stream: &Arc<CudaStream>, tokens: &[usize]) -> Result<Matrix> {
        let hidden = self.model.hidden;
        let [_, features] = hidden.shape;
        let to = match &mut self.gathered {
            Some(buffer) => buffer,
            none => {
                let [chunk, _] = self.logits.matrix.shape;
                none.insert(Buffer::new(stream, hidden.dtype, [chunk, features, features])?)
            }
        };
        let to = to.matrix.rows(0, tokens.len());
        for (i, &token) in tokens.iter().enumerate() {
            // SAFETY: both rows are there.
            unsafe { copy_row(stream, hidden.rows(token, 1), to.rows(i, 1))? };
        }
        Ok(to)
    }

    /// The logits of hidden states.
    ///
    /// # Safety
    /// The conditions are those of [`Products::multiply`].
    unsafe fn logits(&self, products: &mut Products, hidden: Matrix) -> Result<Matrix> {
        let [count, _] = hidden.shape;
        let logits = self.logits.matrix.rows(0, count);
        let bias = self.model.bias.zip(self.ones.as_ref());
        if let Some((bias, ones)) = bias {
            let ones = Matrix::new(ones.matrix.address, bias.dtype, [count, 1]);
            // SAFETY: the caller's.
            unsafe { products.multiply(1.0, [ones, bias], false, logits)? };
        }
        let factors = [hidden, self.model.weight.transposed()];
        // SAFETY: the caller's.
        unsafe { products.multiply(1.0, factors, bias.is_some(), logits)? };
        Ok(logits)
    }
}

/// # Safety
/// Both rows are there, until the stream is done with them.
unsafe fn copy_row(stream: &CudaStream, from: Matrix, to: Matrix) -> Result<()> {
    let (bytes, stream) = (from.bytes_of_row(), stream.cu_stream());
    // SAFETY: the caller's.
    unsafe { result::memcpy_dtod_async(to.address, from.address, bytes, stream) }
        .map_err(driver("copying hidden states"))
}

/// The places of the gradients that are wanted.
struct Addresses {
    hidden: Option<Matrix>,
    weight: Option<Matrix>,
    /// `[1, vocab]`.
    bias: Option<Matrix>,
}

impl Addresses {
    /// The matrices, and what lets the memory's owners wait for the stream.
    fn new<'a>(
        gradients: &'a mut DeviceGradients,
        student: Model,
        stream: &'a CudaStream,
    ) -> (Self, [Option<SyncOnDrop<'a>>; 3]) {
        let GradientsOf { hidden, weight, bias } = gradients;
        let (hidden, of_hidden) = hidden
            .as_mut()
            .map(|hidden| {
                let dtype = hidden.dtype();
                let (address, guard) = hidden.address(stream);
                (Matrix { address, dtype, ..student.hidden }, guard)
            })
            .unzip();
        let (weight, of_weight) = weight
            .as_mut()
            .map(|weight| {
                let (address, guard) = weight.device_ptr_mut(stream);
                (Matrix { address, dtype: Dtype::F32, ..student.weight }, guard)
            })
            .unzip();
        let (bias, of_bias) = bias
            .as_mut()
            .map(|bias| {
                let (address, guard) = bias.device_ptr_mut(stream);
                (Matrix::new(address, Dtype::F32, [1, student.weight.shape[0]]), guard)
            })
            .unzip();
        (Self { hidden, weight, bias }, [of_hidden, of_weight, of_bias])
    }
}

/// One loss. Every address in it is of memory as large as was checked, or was allocated here.
struct Call<'a, 'w> {
    products: &'a mut Products,
    session: Session<'w>,
    /// The factor of the gradients, in the products.
    factor: f32,
    student: WithLogits,
    teacher: WithLogits,
    /// The gradients of the logits of tokens that wait to be multiplied.
    gradient: Buffer,
    /// `[1, as many]`, where the bias's gradient is wanted.
    ones: Buffer,
    to: Addresses,
    /// The tokens that wait.
    waiting: Range<usize>,
    /// The gradients of weight and bias have no addend yet.
    is_first: bool,
}

impl Call<'_, '_> {
    /// Makes 0 what no product writes of the gradients: their rows from `written` on.
    fn clear_padding(&self, written: usize, rows: usize) -> Result<()> {
        let [_, features] = self.student.model.weight.shape;
        for (to, columns) in [(self.to.weight, features), (self.to.bias, 1)] {
            let Some(to) = to.filter(|_| written < rows) else { continue };
            let [start, bytes] =
                [written, rows - written].map(|rows| rows * columns * size_of::<f32>());
            let (address, stream) = (to.address + start as u64, self.products.stream().cu_stream());
            // SAFETY: the gradient has so many rows.
            unsafe { result::memset_d8_async(address, 0, bytes, stream) }
                .map_err(driver("clearing the gradient of padding"))?;
        }
        Ok(())
    }

    fn margins(&mut self, tokens: Range<usize>) -> Result<()> {
        let hidden = self.teacher.model.hidden.rows(tokens.start, tokens.len());
        // SAFETY: the addresses are those of this call.
        unsafe {
            let teacher = raw(self.teacher.logits(self.products, hidden)?);
            self.session.stage(|raw| raw.margins(tokens.start, tokens.len(), teacher))
        }
    }

    /// The terms of these tokens, and the gradients of their logits.
    fn rows(&mut self, tokens: Range<usize>, with_gradient: bool) -> Result<()> {
        let (first, count) = (tokens.start, tokens.len());
        let mut gradient = None;
        if with_gradient {
            if self.waiting.len() + count > self.gradient.matrix.shape[0] {
                self.multiply_waiting()?;
            }
            if self.waiting.is_empty() {
                self.waiting = first..first;
            }
            gradient = Some(self.gradient.matrix.rows(self.waiting.len(), count));
            self.waiting.end = tokens.end;
        }
        let hidden = [&self.teacher, &self.student].map(|of| of.model.hidden.rows(first, count));
        let rows = self.rows_of(hidden, gradient)?;
        // SAFETY: the addresses are those of this call.
        self.session.stage(|raw| unsafe { raw.rows(first, &rows) })
    }

    /// The logits of hidden states, teacher's and student's, and where their gradient goes.
    fn rows_of(&mut self, hidden: [Matrix; 2], gradient: Option<Matrix>) -> Result<RawRows> {
        let [teacher, student] = hidden;
        // SAFETY: the addresses are those of this call.
        let [teacher, student] = unsafe {
            [
                self.teacher.logits(self.products, teacher)?,
                self.student.logits(self.products, student)?,
            ]
        };
        Ok(RawRows {
            tokens: teacher.shape[0],
            teacher: raw(teacher),
            student: raw(student),
            gradient: gradient.map(raw),
            gradient_padding: 0,
        })
    }

    /// The products of the gradients that wait.
    fn multiply_waiting(&mut self) -> Result<()> {
        let (first, count) = (self.waiting.start, self.waiting.len());
        if count == 0 {
            return Ok(());
        }
        self.waiting = 0..0;
        let gradient = self.gradient.matrix.rows(0, count);
        self.write_hidden(gradient, self.to.hidden.map(|to| to.rows(first, count)))?;
        self.add(self.factor, gradient, self.student.model.hidden.rows(first, count))
    }

    fn write_hidden(&mut self, gradient: Matrix, to: Option<Matrix>) -> Result<()> {
        let Some(to) = to else { return Ok(()) };
        let factors = [gradient, self.student.model.weight];
        // SAFETY: the addresses are those of this call.
        unsafe { self.products.multiply(self.factor, factors, false, to) }
    }

    /// Adds what follows for weight and bias from the gradient of the logits of hidden states.
    fn add(&mut self, factor: f32, gradient: Matrix, hidden: Matrix) -> Result<()> {
        let adds = !std::mem::take(&mut self.is_first);
        let [count, _] = gradient.shape;
        let ones = Matrix { shape: [1, count], row: count, ..self.ones.matrix };
        let weight = ([gradient.transposed(), hidden], self.to.weight);
        let bias = ([ones, gradient], self.to.bias);
        for (factors, to) in [weight, bias] {
            if let Some(to) = to {
                // SAFETY: the addresses are those of this call.
                unsafe { self.products.multiply(factor, factors, adds, to)? };
            }
        }
        Ok(())
    }

    /// Computes mispredicted tokens again, of which there are at most as many as a chunk has.
    fn repair(&mut self, tokens: &[usize]) -> Result<()> {
        let (stream, count) = (&self.products.stream().clone(), tokens.len());
        let hidden = [self.teacher.gather(stream, tokens)?, self.student.gather(stream, tokens)?];
        let gradient = self.gradient.matrix.rows(0, count);
        let rows = self.rows_of(hidden, Some(gradient))?;
        if self.to.weight.is_some() || self.to.bias.is_some() {
            self.session.stage(|raw| repair(raw, tokens, &rows, true))?;
            self.add(-self.factor, gradient, hidden[1])?;
        }
        self.session.stage(|raw| repair(raw, tokens, &rows, false))?;
        if let Some(to) = self.to.hidden {
            let [_, features] = to.shape;
            let found = Buffer::new(stream, to.dtype, [count, features, features])?;
            self.write_hidden(gradient, Some(found.matrix))?;
            for (i, &token) in tokens.iter().enumerate() {
                // SAFETY: both rows are there.
                unsafe { copy_row(stream, found.matrix.rows(i, 1), to.rows(token, 1))? };
            }
        }
        self.add(self.factor, gradient, hidden[1])
    }
}

fn raw(matrix: Matrix) -> RawLogits {
    let Matrix { address, dtype, row, .. } = matrix;
    RawLogits { address, dtype, strides: row.into() }
}
