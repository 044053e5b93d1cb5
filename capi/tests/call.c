/* Calls every function of atkd.h; tests/c.rs compiles, links and runs it. */
#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "atkd.h"

enum { TOKENS = 40, VOCAB = 1000, STRIDE = 1003 };

static float teacher[TOKENS * STRIDE], student[TOKENS * STRIDE], gradient[TOKENS * VOCAB];
static int64_t labels[TOKENS];

static void check(AtkdStatus status) {
    if (status != ATKD_OK) {
        fprintf(stderr, "status %d: %s\n", status, atkd_error_message());
        exit(1);
    }
}

static void expect_error(AtkdStatus actual, AtkdStatus expected, const char *part) {
    if (actual != expected || strstr(atkd_error_message(), part) == NULL) {
        fprintf(stderr, "status %d, message \"%s\"; expected %d, and \"%s\" in the message\n", actual,
                atkd_error_message(), expected, part);
        exit(1);
    }
}

static void fill(void) {
    uint64_t state = 1;
    for (int i = 0; i < TOKENS * STRIDE; i++) {
        float *to[2] = {&teacher[i], &student[i]};
        for (int k = 0; k < 2; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            *to[k] = (float)(state >> 40) / (1 << 22) - 2.0f;
        }
    }
    for (int i = 0; i < TOKENS; i++) {
        labels[i] = i % 7 == 3 ? -100 : i * 17 % VOCAB;
    }
}

static AtkdCall new_call(void) {
    AtkdCall call = {0};
    call.tokens = TOKENS;
    call.vocab = VOCAB;
    call.teacher = (AtkdMatrix){.data = teacher, .row_stride = STRIDE, .dtype = ATKD_F32};
    call.student = (AtkdMatrix){.data = student, .row_stride = STRIDE, .dtype = ATKD_F32};
    call.labels = (AtkdLabels){.data = labels, .dtype = ATKD_I64};
    return call;
}

static double log_sum_exp(const float *row) {
    double sum = 0;
    for (int j = 0; j < VOCAB; j++) {
        sum += exp(row[j]);
    }
    return log(sum);
}

/* KL(p || q), and its gradient q - p, from the textbook. */
static void kl_against_the_textbook(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    settings.objective = ATKD_OBJECTIVE_KL;
    settings.reduction = ATKD_REDUCTION_SUM;
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));

    float loss, upstream = 0.5f, uncertainty[TOKENS];
    uint8_t groups[TOKENS];
    AtkdCall call = new_call();
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.upstream = &upstream;
    call.loss = &loss;
    call.uncertainty = uncertainty;
    call.groups = groups;
    check(atkd_forward_backward(objective, workspace, &call));

    double expected = 0;
    int hard_tokens = 0;
    for (int i = 0; i < TOKENS; i++) {
        const float *a = &teacher[i * STRIDE], *b = &student[i * STRIDE];
        double log_p = log_sum_exp(a), log_q = log_sum_exp(b);
        int valid = labels[i] != -100;
        for (int j = 0; j < VOCAB; j++) {
            double p = exp(a[j] - log_p), q = exp(b[j] - log_q);
            expected += valid ? p * (a[j] - log_p - b[j] + log_q) : 0;
            assert(fabs(gradient[i * VOCAB + j] - (valid ? upstream * (q - p) : 0)) < 1e-7);
        }
        double unc = valid ? 1 - exp(a[labels[i]] - log_p) : 0;
        assert(fabs(uncertainty[i] - unc) < 1e-6);
        hard_tokens += groups[i] == ATKD_HARD;
    }
    assert(fabs(loss - expected) < 1e-6 * expected);
    assert(hard_tokens == (34 + 1) / 2);

    float alone;
    call.gradient.data = NULL;
    call.loss = &alone;
    check(atkd_forward(objective, workspace, &call));
    assert(alone == loss);
    atkd_objective_destroy(objective);
}

/* The same with a weight for each token, and a gradient as wide as the student's rows, whose last columns are padding. */
static void weights_and_padding(AtkdWorkspace *workspace) {
    static float padded[TOKENS * STRIDE];
    float weights[TOKENS], token_loss[TOKENS], loss;
    for (int i = 0; i < TOKENS; i++) {
        weights[i] = 0.5f * (float)(i % 4);
    }
    memset(padded, 0xff, sizeof padded);
    AtkdSettings settings = atkd_default_settings();
    settings.objective = ATKD_OBJECTIVE_KL;
    settings.reduction = ATKD_REDUCTION_SUM;
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    AtkdCall call = new_call();
    call.gradient = (AtkdMatrix){.data = padded, .row_stride = STRIDE, .dtype = ATKD_F32};
    call.gradient_padding = STRIDE - VOCAB;
    call.token_weights = weights;
    call.token_loss = token_loss;
    call.loss = &loss;
    check(atkd_forward_backward(objective, workspace, &call));
    double sum = 0;
    for (int i = 0; i < TOKENS; i++) {
        const float *a = &teacher[i * STRIDE], *b = &student[i * STRIDE];
        double log_p = log_sum_exp(a), log_q = log_sum_exp(b), expected = 0;
        double weight = labels[i] == -100 ? 0 : weights[i];
        for (int j = 0; j < STRIDE; j++) {
            double p = exp(a[j] - log_p), q = exp(b[j] - log_q);
            double slope = j < VOCAB ? weight * (q - p) : 0;
            expected += j < VOCAB ? weight * p * (a[j] - log_p - b[j] + log_q) : 0;
            assert(fabs(padded[i * STRIDE + j] - slope) < 2e-7);
        }
        assert(fabs(token_loss[i] - expected) < 2e-6 * (1 + expected));
        sum += token_loss[i];
    }
    assert(fabs(loss - sum) < 1e-6 * sum);
    call.gradient_padding = STRIDE - VOCAB + 1;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "1004");
    call.gradient_padding = -1;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "gradient_padding is -1");
    atkd_objective_destroy(objective);
}

struct job {
    const AtkdObjective *objective;
    AtkdWorkspace *workspace;
    float loss;
    float *gradient;
};

static void *run_job(void *argument) {
    struct job *job = argument;
    AtkdCall call = new_call();
    call.gradient = (AtkdMatrix){.data = job->gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.loss = &job->loss;
    for (int i = 0; i < 20; i++) {
        check(atkd_forward_backward(job->objective, job->workspace, &call));
    }
    return NULL;
}

static void threads_share_everything(AtkdWorkspace *workspace) {
    enum { THREADS = 4 };
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    struct job jobs[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){objective, workspace, NAN, malloc(sizeof gradient)};
        assert(pthread_create(&threads[i], NULL, run_job, &jobs[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        assert(pthread_join(threads[i], NULL) == 0);
        assert(jobs[i].loss == jobs[0].loss && jobs[i].loss > 0);
        assert(memcmp(jobs[i].gradient, jobs[0].gradient, sizeof gradient) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        free(jobs[i].gradient);
    }
    atkd_objective_destroy(objective);
}

static void sequences_and_in_place(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    settings.hard_ratio = 0;
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    int64_t offsets[] = {0, 1, TOKENS};
    uint8_t groups[TOKENS];
    AtkdCall call = new_call();
    call.sequences = 2;
    call.sequence_offsets = offsets;
    call.groups = groups;
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    check(atkd_forward_backward(objective, workspace, &call));
    atkd_objective_destroy(objective);

    float *copy = malloc(sizeof student);
    memcpy(copy, student, sizeof student);
    settings.hard_ratio = 1e-9; /* one token a sequence */
    check(atkd_objective_create(&settings, &objective));
    check(atkd_forward_backward(objective, workspace, &call));
    int hard_tokens = 0;
    for (int i = 0; i < TOKENS; i++) {
        hard_tokens += groups[i] == ATKD_HARD;
    }
    assert(groups[0] == ATKD_HARD && hard_tokens == 2);
    call.student.data = copy;
    call.gradient = call.student;
    check(atkd_forward_backward(objective, workspace, &call));
    for (int i = 0; i < TOKENS; i++) {
        assert(memcmp(&copy[i * STRIDE], &gradient[i * VOCAB], VOCAB * sizeof(float)) == 0);
        if (i + 1 < TOKENS) {
            size_t gap = (size_t)i * STRIDE + VOCAB;
            assert(memcmp(&copy[gap], &student[gap], (STRIDE - VOCAB) * sizeof(float)) == 0);
        }
    }
    free(copy);
    atkd_objective_destroy(objective);
}

/* Tokens that all have the objective's temperature as their own are the objective's, bit for bit. */
static void temperatures_of_tokens(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective, *at_2;
    check(atkd_objective_create(&settings, &objective));
    settings.temperature = 2;
    check(atkd_objective_create(&settings, &at_2));
    float loss, expected, margin[TOKENS], of_all[TOKENS], temperatures[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        temperatures[i] = 2;
    }
    AtkdCall call = new_call();
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.loss = &expected;
    check(atkd_forward_backward(at_2, workspace, &call));
    float *copy = malloc(sizeof gradient);
    memcpy(copy, gradient, sizeof gradient);
    call.margin = of_all;
    check(atkd_teacher_margins(at_2, workspace, &call));
    call.temperatures = temperatures;
    call.margin = margin;
    check(atkd_teacher_margins(objective, workspace, &call));
    assert(memcmp(margin, of_all, sizeof margin) == 0);
    call.loss = &loss;
    check(atkd_forward_backward(objective, workspace, &call));
    assert(loss == expected && memcmp(copy, gradient, sizeof gradient) == 0);
    temperatures[2] = 0;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "temperature of token 2");
    free(copy);
    atkd_objective_destroy(objective);
    atkd_objective_destroy(at_2);
}

static void entropies_against_the_definition(AtkdWorkspace *workspace) {
    float found[TOKENS];
    AtkdEntropies entropies = {.tokens = TOKENS, .vocab = VOCAB, .temperature = 1, .entropies = found};
    entropies.logits = new_call().teacher;
    check(atkd_token_entropies(workspace, &entropies));
    for (int i = 0; i < TOKENS; i++) {
        const float *row = &teacher[i * STRIDE];
        double log_sum = log_sum_exp(row), exact = 0;
        for (int j = 0; j < VOCAB; j++) {
            exact -= exp(row[j] - log_sum) * (row[j] - log_sum);
        }
        assert(fabs(found[i] - exact) < 2e-6 * (1 + exact));
    }
    entropies.temperature = 0;
    expect_error(atkd_token_entropies(workspace, &entropies), ATKD_INVALID_ARGUMENT, "temperature is 0");
    entropies.temperature = 1;
    entropies.entropies = NULL;
    expect_error(atkd_token_entropies(workspace, &entropies), ATKD_INVALID_ARGUMENT, "entropies");
    expect_error(atkd_token_entropies(workspace, NULL), ATKD_INVALID_ARGUMENT, "entropies");
    expect_error(atkd_token_entropies(NULL, &entropies), ATKD_INVALID_ARGUMENT, "workspace");
}

/* Two calls that are told which tokens of both are hard add up to one call over all tokens. */
static void a_selection_over_two_calls(AtkdWorkspace *workspace) {
    enum { FIRST = 13 };
    AtkdSettings settings = atkd_default_settings();
    settings.reduction = ATKD_REDUCTION_SUM;
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    float loss, margins[TOKENS], margin[TOKENS];
    uint8_t valid[TOKENS], hard[TOKENS], groups[TOKENS];
    AtkdCall call = new_call();
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.loss = &loss;
    call.margin = margin;
    call.groups = groups;
    check(atkd_forward_backward(objective, workspace, &call));

    for (int i = 0; i < TOKENS; i++) {
        valid[i] = labels[i] != -100;
        margins[i] = NAN;
    }
    int starts[] = {0, FIRST, TOKENS};
    for (int k = 0; k < 2; k++) {
        AtkdCall part = {0};
        part.tokens = starts[k + 1] - starts[k];
        part.vocab = VOCAB;
        part.teacher = (AtkdMatrix){.data = &teacher[starts[k] * STRIDE], .row_stride = STRIDE, .dtype = ATKD_F32};
        part.labels = (AtkdLabels){.data = &labels[starts[k]], .dtype = ATKD_I64};
        part.margin = &margins[starts[k]];
        check(atkd_teacher_margins(objective, workspace, &part));
    }
    assert(memcmp(margins, margin, sizeof margins) == 0);
    AtkdSelection selection = {0};
    selection.tokens = TOKENS;
    selection.margins = margins;
    selection.valid = valid;
    selection.hard_ratio = 0.5;
    selection.hard = hard;
    check(atkd_select_hard(workspace, &selection));
    for (int i = 0; i < TOKENS; i++) {
        assert(hard[i] == (groups[i] == ATKD_HARD));
    }
    float sum = 0, *of_parts = malloc(sizeof gradient);
    for (int k = 0; k < 2; k++) {
        float part_loss;
        AtkdCall part = new_call();
        part.tokens = starts[k + 1] - starts[k];
        part.teacher.data = &teacher[starts[k] * STRIDE];
        part.student.data = &student[starts[k] * STRIDE];
        part.labels.data = &labels[starts[k]];
        part.gradient = (AtkdMatrix){.data = &of_parts[starts[k] * VOCAB], .row_stride = VOCAB, .dtype = ATKD_F32};
        part.hard = &hard[starts[k]];
        part.loss = &part_loss;
        check(atkd_forward_backward(objective, workspace, &part));
        sum += part_loss;
    }
    assert(fabsf(sum - loss) < 1e-6f * loss);
    assert(memcmp(of_parts, gradient, sizeof gradient) == 0);

    /* The margins' own way: the easiest first. */
    for (int i = 0; i < TOKENS; i++) {
        margins[i] = -margins[i];
    }
    call.margins = margins;
    check(atkd_forward_backward(objective, workspace, &call));
    for (int i = 0; i < TOKENS; i++) {
        assert(groups[i] == (!valid[i] ? ATKD_IGNORED : hard[i] ? ATKD_EASY : ATKD_HARD));
    }

    selection.hard_ratio = 2;
    expect_error(atkd_select_hard(workspace, &selection), ATKD_INVALID_ARGUMENT, "hard ratio is 2");
    selection.hard_ratio = 0.5;
    selection.margins = NULL;
    expect_error(atkd_select_hard(workspace, &selection), ATKD_INVALID_ARGUMENT, "margins");
    expect_error(atkd_select_hard(workspace, NULL), ATKD_INVALID_ARGUMENT, "selection");
    expect_error(atkd_select_hard(NULL, &selection), ATKD_INVALID_ARGUMENT, "workspace");
    selection.tokens = -1;
    expect_error(atkd_select_hard(workspace, &selection), ATKD_INVALID_ARGUMENT, "tokens is -1");
    call.margin = NULL;
    expect_error(atkd_teacher_margins(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "margin");
    expect_error(atkd_teacher_margins(NULL, workspace, &call), ATKD_INVALID_ARGUMENT, "objective");
    free(of_parts);
    atkd_objective_destroy(objective);
}

/* logits[:, :-1] of [batch, time, vocab], and the same rows without gaps. */
static void rows_with_two_strides(AtkdWorkspace *workspace) {
    enum { BATCH = 5, TIME = 8, ROWS = BATCH * (TIME - 1) };
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    float *even[2] = {malloc(ROWS * VOCAB * sizeof(float)), malloc(ROWS * VOCAB * sizeof(float))};
    int64_t targets[ROWS];
    for (int i = 0; i < ROWS; i++) {
        int from = i / (TIME - 1) * TIME + i % (TIME - 1);
        memcpy(&even[0][i * VOCAB], &teacher[from * STRIDE], VOCAB * sizeof(float));
        memcpy(&even[1][i * VOCAB], &student[from * STRIDE], VOCAB * sizeof(float));
        targets[i] = labels[from + 1];
    }
    float losses[2];
    AtkdCall call = new_call();
    call.tokens = ROWS;
    call.labels.data = targets;
    call.teacher = (AtkdMatrix){.data = even[0], .row_stride = VOCAB, .dtype = ATKD_F32};
    call.student = (AtkdMatrix){.data = even[1], .row_stride = VOCAB, .dtype = ATKD_F32};
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.loss = &losses[0];
    check(atkd_forward_backward(objective, workspace, &call));

    float *copy = malloc(sizeof student);
    memcpy(copy, student, sizeof student);
    call.teacher = (AtkdMatrix){
        .data = teacher, .row_stride = STRIDE, .dtype = ATKD_F32, .inner = TIME - 1, .outer_stride = TIME * STRIDE};
    call.student = call.teacher;
    call.student.data = copy;
    call.gradient = call.student;
    call.loss = &losses[1];
    check(atkd_forward_backward(objective, workspace, &call));
    assert(losses[0] == losses[1]);
    for (int b = 0; b < BATCH; b++) {
        for (int t = 0; t < TIME; t++) {
            size_t at = (size_t)(b * TIME + t) * STRIDE;
            const float *row = t + 1 < TIME ? &gradient[(b * (TIME - 1) + t) * VOCAB] : &student[at];
            assert(memcmp(&copy[at], row, VOCAB * sizeof(float)) == 0);
            assert(memcmp(&copy[at + VOCAB], &student[at + VOCAB], (STRIDE - VOCAB) * sizeof(float)) == 0);
        }
    }

    call.student.inner = 6;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "multiple");
    call.student.inner = -7;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "inner is -7");
    call.student = call.gradient;
    call.gradient.outer_stride += STRIDE;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "overlaps");
    call.gradient.outer_stride = 3 * STRIDE;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "rows overlap");
    free(copy);
    free(even[0]);
    free(even[1]);
    atkd_objective_destroy(objective);
}

/* [TOKENS, 2, VOCAB]: the student's row, and beside it the gradient's. */
static void a_gradient_between_the_students_rows(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    AtkdCall call = new_call();
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    check(atkd_forward_backward(objective, workspace, &call));
    float *both = malloc(2 * TOKENS * VOCAB * sizeof(float));
    for (int i = 0; i < TOKENS; i++) {
        memcpy(&both[2 * i * VOCAB], &student[i * STRIDE], VOCAB * sizeof(float));
    }
    call.student = (AtkdMatrix){.data = both, .row_stride = 2 * VOCAB, .dtype = ATKD_F32};
    call.gradient = (AtkdMatrix){.data = both + VOCAB, .row_stride = 2 * VOCAB, .dtype = ATKD_F32};
    check(atkd_forward_backward(objective, workspace, &call));
    for (int i = 0; i < TOKENS; i++) {
        assert(memcmp(&both[2 * i * VOCAB], &student[i * STRIDE], VOCAB * sizeof(float)) == 0);
        assert(memcmp(&both[(2 * i + 1) * VOCAB], &gradient[i * VOCAB], VOCAB * sizeof(float)) == 0);
    }
    call.gradient.data = both + VOCAB - 1;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "overlaps");
    free(both);
    atkd_objective_destroy(objective);
}

static void an_upstream_gradient_that_is_not_finite(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    for (int k = 0; k < 2; k++) {
        float loss, upstream = k == 0 ? INFINITY : NAN;
        AtkdCall call = new_call();
        call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
        call.upstream = &upstream;
        call.loss = &loss;
        check(atkd_forward_backward(objective, workspace, &call));
        assert(isfinite(loss) && loss > 0);
        for (int i = 0; i < TOKENS * VOCAB; i++) {
            assert(labels[i / VOCAB] == -100 ? gradient[i] == 0 : isnan(gradient[i]));
        }
    }
    atkd_objective_destroy(objective);
}

static void counts_that_cannot_be(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    AtkdCall call = new_call();
    int64_t offsets[] = {0, -1, TOKENS};
    call.sequence_offsets = offsets;
    call.sequences = 2;
    expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "offset 1 is -1");
    const int64_t counts[] = {INT64_MAX, INT64_MAX - 1, (int64_t)1 << 60, (int64_t)1 << 40, (int64_t)1 << 31};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        call.sequences = counts[i];
        expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "number of sequences");
    }
    const size_t threads[] = {SIZE_MAX, SIZE_MAX / 2, 100000, ATKD_MAX_THREADS + 1};
    for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
        AtkdWorkspace *none = workspace;
        expect_error(atkd_workspace_create(threads[i], &none), ATKD_INVALID_ARGUMENT, "1024");
        assert(none == NULL);
    }
    atkd_objective_destroy(objective);
}

static void errors(AtkdWorkspace *workspace) {
    AtkdSettings settings = atkd_default_settings();
    AtkdObjective *objective = (AtkdObjective *)&settings;
    expect_error(atkd_objective_create(NULL, &objective), ATKD_INVALID_ARGUMENT, "settings");
    assert(objective == NULL);
    objective = (AtkdObjective *)&settings;
    settings.lambda = 7;
    expect_error(atkd_objective_create(&settings, &objective), ATKD_INVALID_ARGUMENT, "lambda is 7");
    assert(objective == NULL);
    settings.lambda = 0.2;
    settings.target = 5;
    expect_error(atkd_objective_create(&settings, &objective), ATKD_INVALID_ARGUMENT, "target is 5");
    settings.target = ATKD_TARGET_LABEL;
    expect_error(atkd_objective_create(&settings, NULL), ATKD_INVALID_ARGUMENT, "objective");
    check(atkd_objective_create(&settings, &objective));

    AtkdCall call = new_call();
    expect_error(atkd_forward(NULL, workspace, &call), ATKD_INVALID_ARGUMENT, "objective");
    expect_error(atkd_forward(objective, NULL, &call), ATKD_INVALID_ARGUMENT, "workspace");
    expect_error(atkd_forward(objective, workspace, NULL), ATKD_INVALID_ARGUMENT, "call");
    call.tokens = -3;
    expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "tokens is -3");
    call = new_call();
    call.teacher.dtype = ATKD_I64;
    expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "dtype is 3");
    call = new_call();
    call.student.row_stride = VOCAB - 1;
    expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "row stride 999");
    call = new_call();
    int64_t label = labels[9];
    labels[9] = VOCAB;
    expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT,
                 "label of token 9 is 1000");
    labels[9] = label;
    call.gradient = call.teacher;
    expect_error(atkd_forward_backward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "overlaps");
    expect_error(atkd_forward(objective, workspace, &call), ATKD_INVALID_ARGUMENT, "gradient.data");
    AtkdWorkspace *cuda = workspace;
    expect_error(atkd_workspace_create_cuda(-1, TOKENS, &cuda), ATKD_INVALID_ARGUMENT, "device is -1");
    assert(cuda == NULL);
    /* On any machine: it has no driver, or fewer devices. */
    assert(atkd_workspace_create_cuda(4096, TOKENS, &cuda) != ATKD_OK);
    assert(strstr(atkd_error_message(), "driver") != NULL);
    check(atkd_workspace_synchronize(workspace, NULL));
    atkd_objective_destroy(objective);
    atkd_objective_destroy(NULL);
    atkd_workspace_destroy(NULL);
}

/* Two ranks with 300 and 700 of the columns, by JSD, which is exchanged twice, and by the default: the loss and the gradient
   of whole rows. */
static void shards_of_the_vocabulary(AtkdWorkspace *workspace) {
    for (int twice = 0; twice < 2; twice++) {
        AtkdSettings settings = atkd_default_settings();
        settings.divergence = twice ? ATKD_DIVERGENCE_JSD : ATKD_DIVERGENCE_FORWARD_KL;
        AtkdObjective *objective;
        check(atkd_objective_create(&settings, &objective));
        float expected;
        AtkdCall whole = new_call();
        whole.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
        whole.loss = &expected;
        check(atkd_forward_backward(objective, workspace, &whole));

        enum { RANKS = 2 };
        const int first[RANKS + 1] = {0, 300, VOCAB};
        AtkdRowState states[RANKS * TOKENS];
        AtkdSweepTerms terms[RANKS * TOKENS];
        uint8_t hard[TOKENS];
        float margins[TOKENS], losses[RANKS], *gradients = malloc(sizeof gradient);
        AtkdCall calls[RANKS];
        AtkdShard shards[RANKS];
        for (int rank = 0; rank < RANKS; rank++) {
            calls[rank] = new_call();
            calls[rank].vocab = first[rank + 1] - first[rank];
            calls[rank].teacher.data = &teacher[first[rank]];
            calls[rank].student.data = &student[first[rank]];
            calls[rank].gradient =
                (AtkdMatrix){.data = &gradients[first[rank]], .row_stride = VOCAB, .dtype = ATKD_F32};
            calls[rank].loss = &losses[rank];
            calls[rank].hard = hard;
            shards[rank] = (AtkdShard){0};
            shards[rank].call = &calls[rank];
            shards[rank].whole_vocab = VOCAB;
            shards[rank].first_column = first[rank];
            shards[rank].states = states;
            shards[rank].terms = twice ? terms : NULL;
            shards[rank].ranks = RANKS;
            check(atkd_shard_states(objective, workspace, &shards[rank], &states[rank * TOKENS]));
        }
        check(atkd_shard_margins(objective, workspace, &shards[0], margins));
        uint8_t valid[TOKENS];
        for (int i = 0; i < TOKENS; i++) {
            valid[i] = labels[i] != -100;
        }
        AtkdSelection selection = {0};
        selection.tokens = TOKENS;
        selection.margins = margins;
        selection.valid = valid;
        selection.hard_ratio = settings.hard_ratio;
        selection.hard = hard;
        check(atkd_select_hard(workspace, &selection));
        for (int rank = 0; rank < RANKS && twice; rank++) {
            check(atkd_shard_terms(objective, workspace, &shards[rank], &terms[rank * TOKENS]));
        }
        for (int rank = 0; rank < RANKS; rank++) {
            check(atkd_shard_gradient(objective, workspace, &shards[rank]));
            check(atkd_shard_forward(objective, workspace, &shards[rank]));
            assert(losses[rank] == losses[0]);
        }
        assert(fabsf(losses[0] - expected) < 1e-6f * expected);
        for (int i = 0; i < TOKENS * VOCAB; i++) {
            assert(fabsf(gradients[i] - gradient[i]) < 1e-7f);
        }
        /* As a part of 3 tokens in 100. */
        uint32_t counts[2] = {100, 50};
        shards[0].counts = counts;
        check(atkd_shard_forward(objective, workspace, &shards[0]));
        assert(losses[0] < 0.5f * expected && losses[0] > 0);

        calls[0].hard = NULL;
        expect_error(atkd_shard_forward(objective, workspace, &shards[0]), ATKD_INVALID_ARGUMENT, "hard");
        calls[0].hard = hard;
        shards[0].ranks = 0;
        expect_error(atkd_shard_margins(objective, workspace, &shards[0], margins), ATKD_INVALID_ARGUMENT, "row states");
        shards[0].ranks = RANKS;
        shards[0].first_column = VOCAB;
        expect_error(atkd_shard_states(objective, workspace, &shards[0], states), ATKD_INVALID_ARGUMENT,
                     "300 columns from 1000 on");
        shards[0].call = NULL;
        expect_error(atkd_shard_gradient(objective, workspace, &shards[0]), ATKD_INVALID_ARGUMENT, "call");
        if (!twice) {
            expect_error(atkd_shard_terms(objective, workspace, &shards[1], terms), ATKD_INVALID_ARGUMENT,
                         "no second sweep");
        }
        free(gradients);
        atkd_objective_destroy(objective);
    }
}

/* KL divergence of the classes that each tail makes, and its gradient, from the textbook. */
static void a_sparse_teacher(AtkdWorkspace *workspace) {
    enum { TOP_K = 3, KNOWN = TOP_K + 1 };
    static int32_t indices[TOKENS * TOP_K];
    static float log_probs[TOKENS * TOP_K], of_targets[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        const float *a = &teacher[i * STRIDE];
        double log_p = log_sum_exp(a);
        for (int k = 0; k < TOP_K; k++) {
            int j = (i * 31 + k * 7 + 1) % VOCAB;
            indices[i * TOP_K + k] = j == labels[i] ? -1 : j;
            log_probs[i * TOP_K + k] = (float)(a[j] - log_p);
        }
        of_targets[i] = labels[i] == -100 ? NAN : (float)(a[labels[i]] - log_p);
    }
    AtkdSettings settings = atkd_default_settings();
    settings.objective = ATKD_OBJECTIVE_KL;
    settings.reduction = ATKD_REDUCTION_SUM;
    AtkdObjective *objective;
    check(atkd_objective_create(&settings, &objective));
    float loss, alone, margin[TOKENS];
    AtkdSparseTeacher known = {.top_k = TOP_K, .log_probs = log_probs, .target_log_probs = of_targets};
    known.indices = (AtkdLabels){.data = indices, .dtype = ATKD_I32};
    AtkdCall call = new_call();
    call.teacher = (AtkdMatrix){0};
    call.loss = &loss;
    call.margin = margin;
    int32_t tails[] = {ATKD_TAIL_BUCKET, ATKD_TAIL_ZERO, ATKD_TAIL_UNIFORM};
    for (int tail = 0; tail < 3; tail++) {
        known.tail = tails[tail];
        call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
        check(atkd_sparse_forward_backward(objective, workspace, &call, &known));
        double expected = 0;
        for (int i = 0; i < TOKENS; i++) {
            const float *b = &student[i * STRIDE];
            double log_q = log_sum_exp(b), p[VOCAB] = {0}, mass = 0, rest_q = 1;
            int is_known[VOCAB] = {0}, count = 0;
            if (labels[i] == -100) {
                for (int j = 0; j < VOCAB; j++) {
                    assert(gradient[i * VOCAB + j] == 0);
                }
                continue;
            }
            for (int k = 0; k < KNOWN; k++) {
                int j = k < TOP_K ? indices[i * TOP_K + k] : (int)labels[i];
                if (j != -1) {
                    is_known[j] = 1;
                    p[j] = exp(k < TOP_K ? log_probs[i * TOP_K + k] : of_targets[i]);
                    mass += p[j];
                    rest_q -= exp(b[j] - log_q);
                    count++;
                }
            }
            double target = p[labels[i]], off = known.tail == ATKD_TAIL_ZERO ? mass - target : 1 - target;
            assert(fabs(margin[i] - log(off / target)) < 2e-6 * (1 + fabs(margin[i])));
            if (known.tail == ATKD_TAIL_BUCKET) {
                expected += (1 - mass) * log((1 - mass) / rest_q);
            }
            for (int j = 0; j < VOCAB; j++) {
                double q = exp(b[j] - log_q);
                if (known.tail == ATKD_TAIL_ZERO) {
                    p[j] /= mass;
                } else if (known.tail == ATKD_TAIL_UNIFORM && !is_known[j]) {
                    p[j] = (1 - mass) / (VOCAB - count);
                }
                expected += p[j] > 0 ? p[j] * log(p[j] / q) : 0;
                if (known.tail == ATKD_TAIL_BUCKET && !is_known[j]) {
                    p[j] = (1 - mass) * q / rest_q;
                }
                assert(fabs(gradient[i * VOCAB + j] - (q - p[j])) < 2e-6);
            }
        }
        assert(fabs(loss - expected) < 2e-6 * expected);
        call.gradient.data = NULL;
        call.loss = &alone;
        check(atkd_sparse_forward(objective, workspace, &call, &known));
        assert(alone == loss);
        call.loss = &loss;
    }

    call.gradient.data = gradient;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT,
                 "atkd_sparse_forward_backward");
    call.gradient.data = NULL;
    expect_error(atkd_sparse_forward(objective, workspace, &call, NULL), ATKD_INVALID_ARGUMENT, "teacher");
    known.tail = 4;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT, "tail is 4");
    known.tail = ATKD_TAIL_BUCKET;
    known.top_k = 1025;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT, "1025");
    known.top_k = TOP_K;
    known.dtype = ATKD_I64;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT,
                 "log-probabilities' dtype is 3");
    known.dtype = ATKD_F32;
    known.indices.dtype = ATKD_F32;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT, "indices' dtype is 0");
    known.indices = (AtkdLabels){0};
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT, "indices");
    known.indices = (AtkdLabels){.data = indices, .dtype = ATKD_I32};
    call.teacher = new_call().teacher;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT, "teacher.data");
    call.teacher.data = NULL;
    indices[5 * TOP_K + 1] = VOCAB;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT,
                 "index 1 of the teacher's token 5 is 1000");
    indices[5 * TOP_K + 1] = -1;
    known.target_log_probs = NULL;
    expect_error(atkd_sparse_forward(objective, workspace, &call, &known), ATKD_INVALID_ARGUMENT, "token 0");
    atkd_objective_destroy(objective);
}

int main(void) {
    assert(atkd_abi_version() == ATKD_ABI_VERSION);
    assert(strlen(atkd_version()) > 0 && strlen(atkd_error_message()) == 0);
    fill();
    for (size_t threads = 0; threads < 3; threads++) {
        AtkdWorkspace *workspace;
        check(atkd_workspace_create(threads, &workspace));
        kl_against_the_textbook(workspace);
        weights_and_padding(workspace);
        threads_share_everything(workspace);
        sequences_and_in_place(workspace);
        rows_with_two_strides(workspace);
        a_gradient_between_the_students_rows(workspace);
        an_upstream_gradient_that_is_not_finite(workspace);
        counts_that_cannot_be(workspace);
        a_selection_over_two_calls(workspace);
        temperatures_of_tokens(workspace);
        shards_of_the_vocabulary(workspace);
        entropies_against_the_definition(workspace);
        a_sparse_teacher(workspace);
        errors(workspace);
        atkd_workspace_destroy(workspace);
    }
    puts("all passed");
    return 0;
}
