//! A call in stages.

use super::{Extra, Inputs, Simulation, address, input, raw};
use crate::call::{RawOutput, RawRows};
use crate::device::kernel::Launch;
use crate::device::session;
use crate::device::workspace::{Layout, Memory, read_summary};
use crate::simt::machine::Buffer;
use crate::{Batch, Error, Logits, LogitsMut, Objective, Output, Result};

/// A [`cpu::Session`](crate::cpu::Session) through the CUDA kernels. Tokens are ignored by their labels alone, as on a
/// GPU, so that logits of all are to be handed over.
pub struct Session<'a> {
    simulation: Simulation,
    objective: Objective,
    inputs: Inputs<'a>,
    layout: Layout,
    workspace: Vec<u128>,
    /// The parts of the workspace.
    buffers: Vec<Buffer>,
    stages: session::Session,
}

impl Simulation {
    /// Begins a call in stages about the tokens of a batch, whose logits are not read.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn begin<'a>(
        self,
        objective: &Objective,
        batch: &Batch<'a>,
        extra: Extra,
    ) -> Result<Session<'a>> {
        let inputs = Inputs::new(batch, extra);
        let layout = Layout { capacity: inputs.tokens.tokens };
        let mut buffers = Vec::new();
        let workspace = self.workspace(layout, &mut buffers);
        let memory = Memory::new(layout, address(&workspace));
        let (stages, launches) = session::Session::begin(
            objective,
            &inputs.tokens,
            self.device,
            self.preferred,
            memory,
        )?;
        let objective = *objective;
        let session =
            Session { simulation: self, objective, inputs, layout, workspace, buffers, stages };
        session.launch(&launches, [])?;
        Ok(session)
    }
}

impl Session<'_> {
    /// See [`cpu::Session::margins`](crate::cpu::Session::margins).
    ///
    /// # Errors
    /// As there; and as [`Simulation::run`].
    pub fn margins(&mut self, first: usize, teacher: Logits) -> Result<()> {
        self.check_shapes(teacher, &[])?;
        let launches = self.stages.margins(first, teacher.tokens(), raw(teacher))?;
        self.launch(&launches, [input("teacher", teacher.elements())])
    }

    /// See [`cpu::Session::rows`](crate::cpu::Session::rows).
    ///
    /// # Errors
    /// As there; and as [`Simulation::run`].
    pub fn rows(
        &mut self,
        first: usize,
        teacher: Logits,
        student: Logits,
        gradient: Option<LogitsMut>,
    ) -> Result<()> {
        let (rows, buffers) = self.of_rows(teacher, student, gradient.as_ref())?;
        let launches = self.stages.rows(first, &rows)?;
        self.launch(&launches, buffers)
    }

    /// See [`cpu::Session::rows_in_place`](crate::cpu::Session::rows_in_place).
    ///
    /// # Errors
    /// As there; and as [`Simulation::run`].
    pub fn rows_in_place(
        &mut self,
        first: usize,
        teacher: Logits,
        student: LogitsMut,
    ) -> Result<()> {
        let (rows, buffers) = self.of_rows(teacher, student.as_logits(), Some(&student))?;
        let launches = self.stages.rows(first, &rows)?;
        self.launch(&launches, buffers)
    }

    /// See [`cpu::Session::select`](crate::cpu::Session::select).
    ///
    /// # Errors
    /// As there; and as [`Simulation::run`].
    pub fn select(&mut self) -> Result<Vec<usize>> {
        let (launches, predicted) = self.stages.select()?;
        self.launch(&launches, [])?;
        if predicted {
            let count = self.stages.count_changed(&read_summary(self.memory()))?;
            let (_, changed) = self.stages.changed();
            // SAFETY: the column lies in the workspace, and has so many tokens written.
            let changed = unsafe { std::slice::from_raw_parts(changed as *const u32, count) };
            self.stages.mispredict(changed);
        }
        Ok(self.stages.mispredicted())
    }

    /// See [`cpu::Session::repair`](crate::cpu::Session::repair).
    ///
    /// # Errors
    /// As there; and as [`Simulation::run`].
    pub fn repair(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        student: Logits,
        gradient: LogitsMut,
    ) -> Result<()> {
        let layout = Layout { capacity: tokens.len() };
        let scratch = vec![0xdead_beef_dead_beef_dead_beef_dead_beef_u128; layout.bytes() / 16];
        let (rows, buffers) = self.of_rows(teacher, student, Some(&gradient))?;
        let (launches, numbers) = self.stages.repair(tokens, &rows, address(&scratch), false)?;
        for (i, &token) in tokens.iter().enumerate() {
            // SAFETY: the column lies in the scratch memory, and is of so many tokens.
            unsafe { (numbers as *mut u32).add(i).write(token as u32) };
        }
        let columns = layout.columns(address(&scratch) as usize);
        self.launch(&launches, buffers.into_iter().chain(columns.map(|(n, at)| Buffer::at(n, at))))
    }

    /// See [`cpu::Session::finish`](crate::cpu::Session::finish).
    ///
    /// # Errors
    /// As there; and as [`Simulation::run`].
    pub fn finish(mut self) -> Result<Output> {
        let launches = self.stages.finish(&RawOutput::default())?;
        self.launch(&launches, [])?;
        let (tokens, vocab) = (self.inputs.tokens.tokens, self.inputs.tokens.vocab);
        self.layout.read(self.memory(), tokens, vocab, &self.objective)
    }

    fn launch(&self, launches: &[Launch], more: impl IntoIterator<Item = Buffer>) -> Result<()> {
        let mut buffers: Vec<Buffer> =
            self.buffers.iter().cloned().chain(self.inputs.buffers()).chain(more).collect();
        launches.iter().try_for_each(|launch| self.simulation.launch(launch, &mut buffers))
    }

    fn memory(&self) -> &[u8] {
        // SAFETY: so many bytes are there, all of them written.
        unsafe { std::slice::from_raw_parts(self.workspace.as_ptr().cast(), self.layout.bytes()) }
    }

    /// The rows of a stage, and their memory.
    fn of_rows(
        &self,
        teacher: Logits,
        student: Logits,
        gradient: Option<&LogitsMut>,
    ) -> Result<(RawRows, Vec<Buffer>)> {
        let (tokens, gradient) = (teacher.tokens(), gradient.map(LogitsMut::as_logits));
        let others =
            [Some(("the student's logits", student)), gradient.map(|g| ("the gradient", g))];
        self.check_shapes(teacher, &others)?;
        let mut buffers = vec![input("teacher", teacher.elements())];
        let in_place = gradient.is_some_and(|g| raw(g).address == raw(student).address);
        if !in_place {
            buffers.push(input("student", student.elements()));
        }
        buffers
            .extend(gradient.map(|g| Buffer { writable: true, ..input("gradient", g.elements()) }));
        let gradient = gradient.map(raw);
        let (teacher, student) = (raw(teacher), raw(student));
        Ok((RawRows { tokens, teacher, student, gradient, gradient_padding: 0 }, buffers))
    }

    fn check_shapes(
        &self,
        teacher: Logits,
        others: &[Option<(&'static str, Logits)>],
    ) -> Result<()> {
        let expected = [teacher.tokens(), self.inputs.tokens.vocab];
        let teacher = Some(("the teacher's logits", teacher));
        for &(what, logits) in [teacher].iter().chain(others).flatten() {
            let actual = [logits.tokens(), logits.vocab()];
            if actual != expected {
                return Err(Error::ShapeMismatch { what, expected, actual });
            }
        }
        Ok(())
    }
}
