//! A call in stages on a device.

use atkd::cuda::{RawRows, RawTokens, Session as DeviceSession};

use super::stages::{self, Backend, Session, VOCAB, logits, logits_mut};
use super::*;

impl Backend for Gpu {
    fn whole(
        &self,
        objective: &Objective,
        batch: &Batch,
        student: &[bf16],
        gradient: &mut [bf16],
    ) -> Result<Output> {
        self.kernels.forward_backward(objective, batch, logits(student), logits_mut(gradient))
    }

    fn begin<'a>(
        &'a self,
        objective: &Objective,
        batch: &Batch<'a>,
    ) -> Result<Box<dyn Session + 'a>> {
        let capacity = batch.teacher().tokens();
        // A session borrows what is leaked here: little, and for a test.
        let workspace = Box::leak(Box::new(Workspace::new(&self.kernels, &self.stream, capacity)?));
        let mut tokens = match batch.labels() {
            Some(atkd::Labels::I64(labels)) => {
                let on_device = self.kept(labels);
                DeviceTokens::new(DeviceLabels::I64(on_device.slice(..labels.len())), VOCAB)
            }
            _ => DeviceTokens::unlabelled(capacity, VOCAB),
        };
        if let Some(offsets) = batch.sequences() {
            let offsets: Vec<i64> = offsets.iter().map(|&offset| offset as i64).collect();
            tokens = tokens.with_sequences(self.kept(&offsets).as_view())?;
        }
        if let Some(margins) = batch.margins() {
            tokens = tokens.with_margins(self.kept(margins).as_view())?;
        }
        if let Some(hard) = batch.hard() {
            let hard: Vec<u8> = hard.iter().map(|&hard| hard.into()).collect();
            tokens = tokens.with_hard(self.kept(&hard).as_view())?;
        }
        if let Some(weights) = batch.token_weights() {
            tokens = tokens.with_token_weights(self.kept(weights).as_view())?;
        }
        if let Some(temperatures) = batch.temperatures() {
            tokens = tokens.with_temperatures(self.kept(temperatures).as_view())?;
        }
        let session = workspace.begin(&self.stream, objective, tokens, None)?;
        Ok(Box::new(Staged { gpu: self, session }))
    }
}

impl Gpu {
    /// A copy that is never freed. The driver refuses to allocate nothing.
    fn kept<T: DeviceRepr + Default + Clone>(&self, slice: &[T]) -> &'static CudaSlice<T> {
        let some = if slice.is_empty() { &[T::default()][..] } else { slice };
        Box::leak(Box::new(self.upload(some)))
    }
}

struct Staged<'a> {
    gpu: &'a Gpu,
    session: DeviceSession<'a>,
}

fn device_logits(rows: &CudaSlice<bf16>) -> DeviceLogits<'_> {
    DeviceLogits::new(rows, rows.len() / VOCAB, VOCAB).unwrap()
}

fn device_logits_mut(rows: &mut CudaSlice<bf16>) -> DeviceLogitsMut<'_> {
    let tokens = rows.len() / VOCAB;
    DeviceLogitsMut::new(rows, tokens, VOCAB).unwrap()
}

impl Staged<'_> {
    fn upload_rows(&self, rows: &[bf16]) -> Option<CudaSlice<bf16>> {
        (!rows.is_empty()).then(|| self.gpu.upload(rows))
    }
}

impl Session for Staged<'_> {
    fn margins(&mut self, first: usize, teacher: &[bf16]) -> Result<()> {
        let Some(teacher) = self.upload_rows(teacher) else { return Ok(()) };
        self.session.margins(first, &device_logits(&teacher))
    }

    fn rows(
        &mut self,
        first: usize,
        teacher: &[bf16],
        student: &[bf16],
        gradient: Option<&mut [bf16]>,
    ) -> Result<()> {
        let Some(teacher) = self.upload_rows(teacher) else { return Ok(()) };
        let (teacher, student) = (device_logits(&teacher), self.gpu.upload(student));
        let student = device_logits(&student);
        let Some(gradient) = gradient else {
            return self.session.rows(first, &teacher, &student, None);
        };
        let mut to = self.gpu.upload(gradient);
        self.session.rows(first, &teacher, &student, Some(device_logits_mut(&mut to)))?;
        self.gpu.stream.memcpy_dtoh(&to, gradient).unwrap();
        Ok(())
    }

    fn rows_in_place(
        &mut self,
        first: usize,
        teacher: &[bf16],
        student: &mut [bf16],
    ) -> Result<()> {
        let Some(teacher) = self.upload_rows(teacher) else { return Ok(()) };
        let mut place = self.gpu.upload(student);
        let rows = device_logits_mut(&mut place);
        self.session.rows_in_place(first, &device_logits(&teacher), rows)?;
        self.gpu.stream.memcpy_dtoh(&place, student).unwrap();
        Ok(())
    }

    fn select(&mut self) -> Result<Vec<usize>> {
        self.session.select()
    }

    fn repair(
        &mut self,
        tokens: &[usize],
        teacher: &[bf16],
        student: &[bf16],
        gradient: &mut [bf16],
    ) -> Result<()> {
        let (teacher, mut place) = (self.gpu.upload(teacher), self.gpu.upload(student));
        let teacher = device_logits(&teacher);
        // Some beside the logits, some in place.
        let to = if tokens.len().is_multiple_of(2) {
            let mut to = self.gpu.upload(gradient);
            let student = device_logits(&place);
            self.session.repair(tokens, &teacher, &student, device_logits_mut(&mut to))?;
            to
        } else {
            self.session.repair_in_place(tokens, &teacher, device_logits_mut(&mut place))?;
            place
        };
        self.gpu.stream.memcpy_dtoh(&to, gradient).unwrap();
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Output> {
        self.session.finish()?.read(&self.gpu.stream)
    }
}

#[test]
fn ranges_of_any_length_come_to_the_bits_of_one_call() {
    let Some(gpu) = Gpu::new() else { return };
    stages::ranges_of_any_length_come_to_the_bits_of_one_call(&gpu);
}

#[test]
fn ranges_and_margins_of_some_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    stages::ranges_without_gradients(&gpu);
    stages::margins_of_some_tokens(&gpu);
    let preferred = Preference { row_kernel: RowKernel::Pipelined, team: 2 };
    let kernels = Kernels::load_preferring(&gpu.context, Some(preferred)).unwrap();
    let gpu = Gpu { kernels, ..gpu };
    stages::ranges_without_gradients(&gpu);
    stages::margins_of_some_tokens(&gpu);
}

#[test]
fn a_batch_without_a_valid_token_has_no_loss() {
    let Some(gpu) = Gpu::new() else { return };
    stages::a_batch_without_a_valid_token_has_no_loss(&gpu);
}

#[test]
fn stages_out_of_order_are_errors() {
    let Some(gpu) = Gpu::new() else { return };
    stages::stages_out_of_order_are_errors(&gpu);
}

#[test]
fn gradients_wait_for_the_sizes_of_groups() {
    let Some(gpu) = Gpu::new() else { return };
    stages::gradients_wait_for_the_sizes_of_groups(&gpu);
}

/// In a workspace of the caller's, which holds anything.
#[test]
fn stages_by_address() {
    const TOKENS: usize = 23;
    let Some(gpu) = Gpu::new() else { return };
    let (objective, stream) = (Objective::default(), &gpu.stream);
    let mut input = Input::new(TOKENS, VOCAB, 31);
    input.labels[4] = -100;
    // One token in two whose margin is of the other sign.
    for token in (1..TOKENS).step_by(2).filter(|&token| token != 4) {
        input.teacher[token * VOCAB + input.labels[token] as usize] = bf16::from_f32(20.0);
    }
    let [teacher, student] = [&input.teacher, &input.student].map(|rows| gpu.upload(rows));
    let (labels, upstream) = (gpu.upload(&input.labels), gpu.upload(&[0.5_f32]));
    let address = |slice: &CudaSlice<bf16>| slice.device_ptr(stream).0;
    let run = |staged: bool| {
        let gradient = gpu.upload(&vec![bf16::NAN; TOKENS * VOCAB]);
        let results = gpu.upload(&[f32::NAN; TOKENS + 1]);
        let groups = gpu.upload(&[9_u8; TOKENS]);
        let workspace = gpu.upload(&vec![0xab_u8; Kernels::workspace_bytes(TOKENS)]);
        let (results_at, workspace_at) =
            (results.device_ptr(stream).0, workspace.device_ptr(stream).0);
        let output = RawOutput {
            loss: Some(results_at),
            dkd: Some(results_at + 4),
            groups: Some(groups.device_ptr(stream).0),
            ..RawOutput::default()
        };
        let tokens = RawTokens {
            tokens: TOKENS,
            vocab: VOCAB,
            labels: Some(RawLabels::I64(labels.device_ptr(stream).0)),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: Some(upstream.device_ptr(stream).0),
        };
        let logits = |slice: &CudaSlice<bf16>, token: usize| RawLogits {
            address: address(slice) + (token * VOCAB * size_of::<bf16>()) as u64,
            dtype: Dtype::Bf16,
            strides: VOCAB.into(),
        };
        let rows = |first: usize, tokens: usize| RawRows {
            tokens,
            teacher: logits(&teacher, first),
            student: logits(&student, first),
            gradient: Some(logits(&gradient, first)),
            gradient_padding: 0,
        };
        if staged {
            // SAFETY: the addresses are of the arrays above, used on one stream, as they are below.
            unsafe {
                let kernels = &gpu.kernels;
                let capturing = gpu.context.new_stream().unwrap();
                stream.synchronize().unwrap();
                let mut session =
                    kernels.begin_raw(&capturing, &objective, &tokens, workspace_at).unwrap();
                begin(&capturing);
                assert_eq!(session.repair(&[0], &rows(0, 1), 0), Err(Error::CapturedRepair));
                let _ = capturing.end_capture(CUgraphInstantiate_flags(0));
                capturing.synchronize().unwrap();
                let mut session =
                    kernels.begin_raw(stream, &objective, &tokens, workspace_at).unwrap();
                session.rows(9, &rows(9, TOKENS - 9)).unwrap();
                session.rows(0, &rows(0, 9)).unwrap();
                let mispredicted = session.select().unwrap();
                assert!(!mispredicted.is_empty(), "nothing was to be repaired");
                for token in mispredicted {
                    let scratch = gpu.upload(&vec![0xcd_u8; Kernels::workspace_bytes(1)]);
                    let scratch_at = scratch.device_ptr(stream).0;
                    session.repair(&[token], &rows(token, 1), scratch_at).unwrap();
                }
                session.finish(&output).unwrap();
            }
        } else {
            let RawTokens { tokens, vocab, labels, upstream, .. } = tokens;
            let RawRows { teacher, student, gradient, .. } = rows(0, TOKENS);
            let (sequences, margins, hard) = (None, None, None);
            let call = RawCall {
                tokens,
                vocab,
                teacher,
                student,
                gradient,
                gradient_padding: 0,
                labels,
                sequences,
                margins,
                hard,
                token_weights: None,
                temperatures: None,
                upstream,
            };
            // SAFETY: as above.
            unsafe {
                gpu.kernels.launch_raw(stream, &objective, &call, workspace_at, &output).unwrap();
            }
        }
        let results: Vec<u32> =
            stream.clone_dtoh(&results).unwrap().into_iter().map(f32::to_bits).collect();
        let gradient: Vec<u16> =
            stream.clone_dtoh(&gradient).unwrap().into_iter().map(bf16::to_bits).collect();
        (results, stream.clone_dtoh(&groups).unwrap(), gradient)
    };
    // The first call predicts by nothing that it could know.
    let (staged, whole) = (run(true), run(false));
    assert!(whole.1.contains(&0) && whole.1.contains(&1) && whole.1.contains(&2));
    assert!(staged == whole);
}

/// A label out of range is reported by its place in the whole call, and a session that is dropped leaves no counts behind.
#[test]
fn sessions_that_end_badly() {
    let Some(gpu) = Gpu::new() else { return };
    let (objective, stream) = (Objective::default(), &gpu.stream);
    let mut input = Input::new(12, VOCAB, 32);
    let mut loaded = Loaded::new(&gpu, stream, &input);
    let vocab = input.vocab;
    let rows = |rows: &CudaSlice<bf16>, range: std::ops::Range<usize>| {
        stream.clone_dtod(&rows.slice(vocab * range.start..vocab * range.end)).unwrap()
    };
    {
        let tokens = DeviceTokens::new(&loaded.labels, vocab);
        let mut session = loaded.workspace.begin(stream, &objective, tokens, None).unwrap();
        let (teacher, student) = (rows(&loaded.teacher, 0..5), rows(&loaded.student, 0..5));
        session.rows(0, &device_logits(&teacher), &device_logits(&student), None).unwrap();
    }
    assert!(loaded.loss().is_nan());
    assert_eq!(loaded.workspace.read_loss(stream), Err(Error::FailedCall));
    loaded.backward(&objective, None).unwrap();
    input.check(&objective, &loaded.read());

    (input.labels[7], input.labels[9]) = (vocab as i64, -3);
    loaded.replace(&input);
    let tokens = DeviceTokens::new(&loaded.labels, vocab);
    let mut session = loaded.workspace.begin(stream, &objective, tokens, None).unwrap();
    for range in [6..12, 0..6] {
        let (teacher, student) =
            (rows(&loaded.teacher, range.clone()), rows(&loaded.student, range.clone()));
        session
            .rows(range.start, &device_logits(&teacher), &device_logits(&student), None)
            .unwrap();
    }
    let fault = session.finish().unwrap().read_loss(stream).unwrap_err();
    assert_eq!(fault, Error::DeviceLabel { token: 7, vocab, ignore_index: -100 });

    // Scopes that overlap would list a token again and again.
    input.labels.fill(0);
    loaded.replace(&input);
    let offsets: Vec<i64> = (0..200).map(|i| if i % 2 == 0 { 0 } else { 12 - i % 4 }).collect();
    let offsets = gpu.upload(&offsets);
    let tokens =
        DeviceTokens::new(&loaded.labels, vocab).with_sequences(offsets.as_view()).unwrap();
    let mut session = loaded.workspace.begin(stream, &objective, tokens, None).unwrap();
    let (teacher, student) = (device_logits(&loaded.teacher), device_logits(&loaded.student));
    let mut gradient = gpu.upload(&vec![bf16::NAN; 12 * vocab]);
    session.rows(0, &teacher, &student, Some(device_logits_mut(&mut gradient))).unwrap();
    assert!(matches!(session.select(), Err(Error::DeviceSequences { .. })));
    assert_eq!(session.finish().map(drop), Err(Error::FailedCall));

    // A session that is never dropped leaves its counts to the next call.
    assert!(loaded.workspace.read_loss(stream).is_err());
    let tokens = DeviceTokens::new(&loaded.labels, vocab);
    std::mem::forget(loaded.workspace.begin(stream, &objective, tokens, None).unwrap());
    loaded.workspace.reserve(stream, 100).unwrap();
    loaded.backward(&objective, None).unwrap();
    input.check(&objective, &loaded.read());
}
