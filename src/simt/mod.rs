//! The CUDA kernels on the CPU: the same source files, compiled as C++ and run by a simulator that
//! checks every access and every barrier. For tests on machines without a GPU; slow.

pub mod machine;

use std::ffi::c_void;

use machine::{Buffer, Kernel, Launch};

use crate::params::*;
use crate::{
    Batch, Coefficient, Dtype, Elements, Error, Labels, Logits, LogitsMut, Objective, Output,
    Reduction, Result, Target, TokenTerms,
};

macro_rules! kernels {
    ($params:ty: $($name:ident),* $(,)?) => {
        unsafe extern "C" {
            $(fn $name(parameters: &$params);)*
        }
    };
}
kernels!(atkd_teacher_margin: teacher_margin_f32, teacher_margin_f16, teacher_margin_bf16);
kernels!(atkd_select_hard: select_hard);
kernels!(atkd_sum_losses: sum_losses);
kernels!(atkd_row_stream:
    row_stream_f32_f32_f32, row_stream_f32_f16_f16, row_stream_f32_f16_f32,
    row_stream_f32_bf16_bf16, row_stream_f32_bf16_f32,
    row_stream_f16_f32_f32, row_stream_f16_f16_f16, row_stream_f16_f16_f32,
    row_stream_f16_bf16_bf16, row_stream_f16_bf16_f32,
    row_stream_bf16_f32_f32, row_stream_bf16_f16_f16, row_stream_bf16_f16_f32,
    row_stream_bf16_bf16_bf16, row_stream_bf16_bf16_f32,
);

fn row_stream(teacher: Dtype, student: Dtype, gradient: Dtype) -> Kernel<atkd_row_stream> {
    use Dtype::{Bf16, F16, F32};
    match (teacher, student, gradient) {
        (F32, F32, _) => row_stream_f32_f32_f32,
        (F32, F16, F32) => row_stream_f32_f16_f32,
        (F32, F16, _) => row_stream_f32_f16_f16,
        (F32, Bf16, F32) => row_stream_f32_bf16_f32,
        (F32, Bf16, _) => row_stream_f32_bf16_bf16,
        (F16, F32, _) => row_stream_f16_f32_f32,
        (F16, F16, F32) => row_stream_f16_f16_f32,
        (F16, F16, _) => row_stream_f16_f16_f16,
        (F16, Bf16, F32) => row_stream_f16_bf16_f32,
        (F16, Bf16, _) => row_stream_f16_bf16_bf16,
        (Bf16, F32, _) => row_stream_bf16_f32_f32,
        (Bf16, F16, F32) => row_stream_bf16_f16_f32,
        (Bf16, F16, _) => row_stream_bf16_f16_f16,
        (Bf16, Bf16, F32) => row_stream_bf16_bf16_f32,
        (Bf16, Bf16, _) => row_stream_bf16_bf16_bf16,
    }
}

/// How the kernels are run.
#[derive(Clone, Copy, Debug)]
pub struct Simulation {
    /// Threads a block, whole warps, at most 1024.
    pub block: u32,
    /// Of the order in which blocks and threads take turns: no result may depend on it.
    pub seed: u64,
}

impl Default for Simulation {
    fn default() -> Self {
        Self { block: 64, seed: 0 }
    }
}

/// Bytes that one kernel read and wrote, by buffer.
pub type Traffic = Vec<(&'static str, Vec<Buffer>)>;

/// Memory of any element type, as a kernel's buffer.
fn input(name: &'static str, elements: Elements) -> Buffer {
    match elements {
        Elements::F32(v) => Buffer::input(name, v),
        Elements::F16(v) => Buffer::input(name, v),
        Elements::Bf16(v) => Buffer::input(name, v),
    }
}

fn address(elements: Elements) -> *const c_void {
    elements.as_ptr().cast()
}

/// As [`cpu::forward`](crate::cpu::forward), through the CUDA kernels.
///
/// # Errors
/// As [`cpu::forward`](crate::cpu::forward).
///
/// # Panics
/// If a kernel does what it must not.
pub fn forward(objective: &Objective, batch: &Batch, student: Logits) -> Result<Output> {
    Ok(Simulation::default().run(objective, batch, student, None)?.0)
}

/// As [`cpu::forward_backward`](crate::cpu::forward_backward), through the CUDA kernels.
///
/// # Errors
/// As [`cpu::forward_backward`](crate::cpu::forward_backward).
///
/// # Panics
/// If a kernel does what it must not.
pub fn forward_backward(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    mut gradient: LogitsMut,
) -> Result<Output> {
    let simulation = Simulation::default();
    Ok(simulation.run(objective, batch, student, Some(&mut gradient))?.0)
}

impl Simulation {
    /// Loss, gradient where one is wanted, and what was read and written.
    ///
    /// # Errors
    /// As [`forward_backward`].
    ///
    /// # Panics
    /// As [`forward_backward`].
    pub fn run(
        self,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: Option<&mut LogitsMut>,
    ) -> Result<(Output, Traffic)> {
        let shape = [student.tokens(), student.vocab()];
        batch.check_shape("the student's logits", shape)?;
        if let Some(gradient) = &gradient {
            let view = gradient.as_logits();
            batch.check_shape("the gradient", [view.tokens(), view.vocab()])?;
            if view.dtype() != student.dtype() && view.dtype() != Dtype::F32 {
                let actual = view.dtype();
                return Err(Error::GradientDtype { student: student.dtype(), actual });
            }
        }
        batch.valid_labels(objective)?;
        let teacher = batch.teacher();
        let (tokens, vocab) = (teacher.tokens(), teacher.vocab());
        let inverse_temperature = (1.0 / objective.temperature()) as f32;

        // The workspace.
        let mut targets = vec![-7_i32; tokens];
        let mut keys = vec![0xdead_beef_u32; tokens];
        let mut modes = vec![0xaa_u8; tokens];
        let mut fault = [u64::MAX];
        let mut columns = vec![f32::NAN; 4 * tokens];
        let mut token_loss = vec![f64::NAN; tokens];
        let mut loss = [f64::NAN];
        let offsets: Vec<i64> =
            std::iter::once(0).chain(batch.scopes().map(|scope| scope.end as i64)).collect();
        let mut thresholds = vec![0_u32; offsets.len() - 1];

        let (labels, label_bytes) = match batch.labels() {
            None => (None, 0),
            Some(Labels::I64(v)) => (Some((v.as_ptr().cast(), Buffer::input("labels", v))), 8),
            Some(Labels::I32(v)) => (Some((v.as_ptr().cast(), Buffer::input("labels", v))), 4),
        };
        let device_batch = atkd_batch {
            teacher: address(teacher.elements()),
            labels: labels.as_ref().map_or(std::ptr::null(), |(address, _)| *address),
            targets: targets.as_mut_ptr(),
            fault: fault.as_mut_ptr(),
            teacher_stride: teacher.row_stride() as i64,
            ignore_index: objective.ignore_index(),
            tokens: tokens as u32,
            vocab: vocab as u32,
            label_bytes,
            target: match objective.target() {
                Target::Label => ATKD_TARGET_LABEL,
                Target::Teacher => ATKD_TARGET_TEACHER,
            },
            inverse_temperature,
            reserved: 0,
        };
        let mut common = vec![
            input("teacher", teacher.elements()),
            Buffer::output("targets", &mut targets),
            Buffer::output("fault", &mut fault),
        ];
        common.extend(labels.map(|(_, buffer)| buffer));

        let mut traffic: Traffic = Vec::new();
        let depends = objective.depends_on_selection();
        // Where nothing depends on the selection only valid tokens are counted beforehand, and it is
        // made afterwards, for the summary's sake.
        let margins = depends || objective.target() == Target::Teacher;
        if margins {
            let parameters = atkd_teacher_margin { batch: device_batch, keys: keys.as_mut_ptr() };
            let kernel: Kernel<atkd_teacher_margin> = match teacher.dtype() {
                Dtype::F32 => teacher_margin_f32,
                Dtype::F16 => teacher_margin_f16,
                Dtype::Bf16 => teacher_margin_bf16,
            };
            let buffers = [Buffer::output("keys", &mut keys)];
            self.launch(
                "teacher_margin",
                tokens,
                kernel,
                &parameters,
                &common,
                buffers,
                &mut traffic,
            );
        }
        let mut selection = |keys: Option<&[u32]>, traffic: &mut Traffic| {
            let mut counts = [0_u32; 2];
            let parameters = atkd_select_hard {
                batch: device_batch,
                keys: keys.map_or(std::ptr::null(), <[u32]>::as_ptr),
                offsets: offsets.as_ptr(),
                modes: modes.as_mut_ptr(),
                thresholds: thresholds.as_mut_ptr(),
                valid: &raw mut counts[0],
                hard: &raw mut counts[1],
                hard_ratio: objective.hard_ratio(),
            };
            let mut buffers = vec![
                Buffer::input("offsets", &offsets),
                Buffer::output("modes", &mut modes),
                Buffer::output("thresholds", &mut thresholds),
                Buffer::output("counts", &mut counts),
            ];
            buffers.extend(keys.map(|keys| Buffer::input("keys", keys)));
            let scopes = offsets.len() - 1;
            self.launch("select_hard", scopes, select_hard, &parameters, &common, buffers, traffic);
            (modes.clone(), counts)
        };
        let (modes, counts) = selection(margins.then_some(&keys), &mut traffic);

        let number = |coefficient| match coefficient {
            Coefficient::Constant(value) => atkd_coefficient {
                value: (value * objective.distillation_scale()) as f32,
                times_uncertainty: 0,
            },
            Coefficient::Uncertainty => atkd_coefficient {
                value: objective.distillation_scale() as f32,
                times_uncertainty: 1,
            },
        };
        let (easy, hard) = (objective.easy(), objective.hard());
        let mean = u32::from(objective.reduction() == Reduction::Mean);
        // Any number of tokens will do for the reductions that do not divide by it.
        let scale = objective.reduction_scale(1);
        let upstream = [objective.upstream_gradient() as f32];
        let [margin, uncertainty, tkd, dkd] =
            std::array::from_fn(|i| columns[i * tokens..][..tokens].as_mut_ptr());
        let (gradient_address, gradient_stride, gradient_dtype, gradient_buffer) = match gradient {
            None => (std::ptr::null_mut(), 0, student.dtype(), None),
            Some(gradient) => {
                let view = gradient.as_logits();
                let mut buffer = input("gradient", view.elements());
                buffer.allow_writing();
                let address = address(view.elements()).cast_mut();
                (address, view.row_stride() as i64, view.dtype(), Some(buffer))
            }
        };
        let parameters = atkd_row_stream {
            batch: device_batch,
            objective: atkd_objective {
                tkd: [number(easy.tkd), number(hard.tkd)],
                dkd: [number(easy.dkd), number(hard.dkd)],
                ce_weight: objective.ce_weight() as f32,
                inverse_temperature,
                scale,
                mean,
                reserved: 0,
            },
            student: address(student.elements()),
            gradient: gradient_address,
            modes: modes.as_ptr(),
            valid: &raw const counts[0],
            upstream: upstream.as_ptr(),
            margin,
            uncertainty,
            tkd,
            dkd,
            loss: token_loss.as_mut_ptr(),
            keys: if margins { std::ptr::null_mut() } else { keys.as_mut_ptr() },
            student_stride: student.row_stride() as i64,
            gradient_stride,
        };
        let kernel = row_stream(teacher.dtype(), student.dtype(), gradient_dtype);
        let mut buffers = vec![
            input("student", student.elements()),
            Buffer::input("modes", &modes),
            Buffer::input("counts", &counts),
            Buffer::input("upstream", &upstream),
            Buffer::output("terms", &mut columns),
            Buffer::output("token losses", &mut token_loss),
            Buffer::output("keys", &mut keys),
        ];
        buffers.extend(gradient_buffer);
        self.launch("row_stream", tokens, kernel, &parameters, &common, buffers, &mut traffic);

        let modes = if margins { modes } else { selection(Some(&keys), &mut traffic).0 };

        let parameters = atkd_sum_losses {
            token_loss: token_loss.as_ptr(),
            valid: &raw const counts[0],
            loss: loss.as_mut_ptr(),
            scale,
            tokens: tokens as u32,
            mean,
        };
        let buffers = [
            Buffer::input("token losses", &token_loss),
            Buffer::input("counts", &counts),
            Buffer::output("loss", &mut loss),
        ];
        self.launch("sum_losses", 1, sum_losses, &parameters, &[], buffers, &mut traffic);

        let tokens = (0..tokens)
            .map(|i| TokenTerms {
                margin: columns[i].into(),
                uncertainty: columns[tokens + i].into(),
                tkd: columns[2 * tokens + i].into(),
                dkd: columns[3 * tokens + i].into(),
                loss: token_loss[i],
                valid: u32::from(modes[i]) != ATKD_IGNORED,
                hard: u32::from(modes[i]) == ATKD_HARD,
            })
            .collect();
        Ok((Output { loss: loss[0], tokens }, traffic))
    }

    #[expect(clippy::too_many_arguments)]
    fn launch<P: 'static>(
        self,
        name: &'static str,
        grid: usize,
        kernel: Kernel<P>,
        parameters: &P,
        common: &[Buffer],
        buffers: impl IntoIterator<Item = Buffer>,
        traffic: &mut Traffic,
    ) {
        let mut buffers: Vec<Buffer> = common.iter().cloned().chain(buffers).collect();
        let launch = Launch { kernel: name, grid: grid as u32, block: self.block, seed: self.seed };
        // SAFETY: every pointer in the parameters is to one of the buffers, or null.
        unsafe { machine::run(launch, kernel, parameters, &mut buffers) }
            .unwrap_or_else(|fault| panic!("{fault}"));
        traffic.push((name, buffers));
    }
}
