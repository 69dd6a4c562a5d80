#include "engine/turn.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

namespace torpor {
namespace {

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void TurnOutcome::wait_for_save() {
  if (!saving.valid()) return;
  const auto start = std::chrono::steady_clock::now();
  try {
    result.bytes.written = saving.get().bytes_written;
  } catch (const Error& error) {
    result.save_error = TurnTransaction::save_failed(result.agent, error);
  }
  result.timing_ms.save += ms_since(start);
}

AgentHold EngineTurn::wake(EngineParts& parts, const TurnRequest& request, TurnResult& result) {
  const auto start = Clock::now();
  if (request.presence == TurnRequest::Presence::kNew) parts.agents->require_free(request.agent);
  if (request.presence == TurnRequest::Presence::kThere) parts.agents->require(request.agent);
  AgentHold hold =
      request.agent.empty() ? parts.agents->stateless(request.salt) : parts.agents->wake(request.agent, request.salt);
  result.damage = hold->damage;
  result.timing_ms.load = parts.load_ms;
  result.timing_ms.wake = hold.woke() ? ms_since(start) : 0;
  return hold;
}

GenerateOptions EngineTurn::options_of(const TurnRequest& request, Scheduler::Listener& listener) {
  GenerateOptions options = request.generate;
  options.on_text = [&listener](std::string_view text) { listener.say(text); };
  options.on_prefill = [&listener](int done, int total) { listener.read(done, total); };
  return options;
}

EngineTurn::EngineTurn(EngineParts& parts, const TurnRequest& request, std::string branch_of, Scheduler::Listener& listener,
                       TurnOutcome& outcome)
    : parts_(parts), request_(request), branch_of_(std::move(branch_of)), outcome_(outcome), result_(outcome.result),
      start_(Clock::now()), transaction_(*parts.agents, wake(parts, request, result_), input()), begin_ms_(ms_since(start_)),
      generation_(parts.model->info(), parts.tokenizer, transaction_.reused(),
                  {transaction_.pending().begin(), transaction_.pending().end()}, options_of(request, listener),
                  {transaction_.tokens().begin(), transaction_.tokens().begin() + transaction_.reused()}) {
  result_.tokens.prompt = int(transaction_.tokens().size());
  result_.tokens.cached = transaction_.reused();
  result_.tokens.again = transaction_.again();
  result_.divergence = transaction_.divergence();
}

TurnInput EngineTurn::input() const {
  return {.prompt = request_.prompt, .system = request_.system, .raw = request_.raw, .messages = request_.messages,
          .keeps = request_.on_divergence == OnDivergence::kBranch, .branch_of = branch_of_,
          .variables = template_variables(request_.tools, request_.template_arguments), .special = request_.special,
          .tokenizer = parts_.tokenizer,
          .chat_template = parts_.chat_template};
}

EngineTurn::~EngineTurn() {
  if (!committed_) transaction_.keep_for_retry(request_.save != SaveMode::kNo);
  ++parts_.ended;
}

int EngineTurn::alike(const EngineTurn& other) const {
  // Who waited for another one's rows would tell its client that there are any.
  if (transaction_.agent().lineage.salt != other.transaction_.agent().lineage.salt) return 0;
  const std::span<const int32_t> wanted = std::span(transaction_.tokens()).first(transaction_.tokens().size() - 1);
  const std::vector<int32_t>& tokens = other.transaction_.tokens();
  return int(std::mismatch(wanted.begin(), wanted.end(), tokens.begin(), tokens.end()).first - wanted.begin());
}

bool EngineTurn::waits_for(std::span<const Computing> earlier, std::span<EngineTurn* const> others) {
  constexpr int kWorthWaiting = 16;  // tokens
  if (!transaction_.is_new()) return false;
  const int before = transaction_.cache().length();
  if (std::exchange(ended_, parts_.ended) != parts_.ended) transaction_.reuse_prefix();  // what one of those has left
  const int held = transaction_.cache().length();
  bool waits = false;
  for (const Computing& computing : earlier) {
    const int common = alike(*computing.turn);
    if (common <= held + kWorthWaiting || computing.turn->transaction_.cache().length() >= common) continue;
    computing.turn->transaction_.stop_at(common);
    waits = true;
  }
  const bool has_runs = parts_.model->backend() == Backend::kKernels;
  EngineTurn* has_most = nullptr;
  int takes = held;
  for (EngineTurn* other : others) {
    if (other == this) continue;
    const int common = alike(*other), there = other->transaction_.cache().length();
    // Whole runs cost nothing to share. A cut is made once: of a turn that computes no more of what is common, or to go on.
    // Nor are arrays taken that grow yet: whoever appends first would copy them.
    const int runs = has_runs ? there / kSegmentTokens * kSegmentTokens : 0;
    const int here = there < common && waits ? runs : std::min(there, common);
    if (common > held + kWorthWaiting && here > takes) {
      takes = here;
      has_most = other;
    }
  }
  if (has_most != nullptr) transaction_.share_rows(has_most->transaction_, takes);
  if (const int more = transaction_.cache().length() - before; more > 0) {
    generation_.skip(more);
    result_.tokens.cached += more;
    result_.tokens.again = transaction_.again();
  }
  return waits;
}

bool EngineTurn::let_go() noexcept {
  try {
    const bool held = transaction_.cache().length() > 0;
    transaction_.put_aside();
    parts_.work.put_aside += held ? 1 : 0;
    return true;
  } catch (...) {
    return false;
  }
}

std::vector<int> EngineTurn::share(const PrefillPace& pace, std::span<const Computing> turns, std::span<const int> left,
                                   std::span<const int> guesses) {
  std::vector<size_t> ranked(turns.size());
  std::iota(ranked.begin(), ranked.end(), size_t(0));
  std::ranges::sort(ranked, {}, [&](size_t i) { return turns[i].step->rank; });
  const auto waits = std::ranges::find_if(ranked, [&](size_t i) { return turns[i].turn->request_.background; });
  std::vector<int> ranked_left, ranked_guesses, shares(turns.size());
  for (const size_t i : ranked) {
    ranked_left.push_back(left[i]);
    ranked_guesses.push_back(guesses[i]);
  }
  const std::vector<int> rows = pace.share(ranked_left, ranked_guesses, size_t(waits - ranked.begin()));
  for (size_t i = 0; i < ranked.size(); ++i) shares[ranked[i]] = rows[i];
  return shares;
}

void EngineTurn::compute(EngineParts& parts, std::span<const Computing> batch) {
  std::vector<ForwardSequence> sequences;
  size_t rows = 0;
  int guesses = 0;
  int64_t prompt_tokens = 0, answer_tokens = 0;
  for (const auto& [turn, step, tokens] : batch) {
    const int guessed = turn->generation_.guessed();
    sequences.push_back({.tokens = tokens, .kv = &turn->transaction_.cache(), .all_logits = guessed > 0,
                         .no_logits = !turn->generation_.wants_logits()});
    rows += tokens.size();
    guesses += guessed;
    (turn->generation_.prompt_left() > 0 ? prompt_tokens : answer_tokens) += int64_t(tokens.size());
  }
  const auto start = Clock::now();
  std::optional<mx::array> logits;
  try {
    logits = parts.model->forward(sequences);
  } catch (...) {
    if (batch.size() == 1) {
      batch.front().step->error = std::current_exception();
      return;
    }
    // Nothing has changed. Whoever fails alone too is whose error it is.
    for (const Computing& alone : batch) compute(parts, {&alone, 1});
    return;
  }
  // The speed of a prefill; a token of an answer takes longer than one of many.
  const double seconds = ms_since(start) / 1000;
  if (prompt_tokens == 0) {
    parts.row_cost.took(int(batch.size()), guesses, seconds);
  } else if (rows > batch.size()) {
    parts.pace->took(int(rows), seconds);
  }
  ++parts.work.passes;
  parts.work.turns += int64_t(batch.size());
  parts.work.most_turns = std::max(parts.work.most_turns, int64_t(batch.size()));
  parts.work.prompt_tokens += prompt_tokens;
  parts.work.answer_tokens += answer_tokens;

  const size_t vocab = size_t(logits->shape(-1));
  const float* row = logits->data<float>();
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto& [turn, step, tokens] = batch[i];
    const std::span<const float> own(row, sequences[i].no_logits ? 0 : sequences[i].all_logits ? tokens.size() * vocab : vocab);
    row += own.size();
    step->rows = int64_t(tokens.size());
    turn->transaction_.cache().record_tokens(tokens);
    turn->transaction_.keep_due_state();
    try {
      turn->take(own, turn->transaction_.cache().length() - int(tokens.size()));
      step->computed = turn->generation_.over();
    } catch (...) {
      step->error = std::current_exception();
    }
  }
}

void EngineTurn::take(std::span<const float> logits, int before) {
  const int proposed = generation_.proposed(), accepted = generation_.accepted();
  generation_.take(logits);
  const int right = generation_.accepted() - accepted, wrong = generation_.proposed() - proposed - right;
  parts_.work.accepted_tokens += right;
  parts_.work.rejected_tokens += wrong;
  parts_.work.answer_tokens -= wrong;
  const int kept = generation_.position();
  if (transaction_.cache().length() == kept) {
    if (generation_.may_be_cut()) answer_states_.keep(transaction_.cache());
    return;
  }
  if (kept > before) {  // guesses that were wrong: nobody else has seen their rows
    transaction_.cache().truncate(kept);
    return;
  }
  // Those of a stop string.
  if (!transaction_.cache().state_layout().empty() && !transaction_.cache().layout().has_windows()) {
    return cut_again(kept);
  }
  if (!transaction_.cache().can_truncate(kept)) {
    throw Error(ErrorCode::kInternal,
                "The stop string's tokens can't be taken back: a sliding window has left rows behind; ask again.");
  }
  transaction_.take_back(kept);
}

int EngineTurn::up_to_stop(int rows) const {
  if (generation_.prompt_left() == 0) return rows;
  const int64_t length = transaction_.agent().cache->length();
  const auto stop = std::ranges::upper_bound(transaction_.stops(), length);
  return stop == transaction_.stops().end() ? rows : int(std::min<int64_t>(rows, *stop - length));
}

void EngineTurn::cut_again(int n_tokens) {
  KvCache& cache = transaction_.cache();
  const std::vector<int32_t> tokens(cache.tokens().begin(), cache.tokens().begin() + n_tokens);
  const int from = cache.resumable(n_tokens);
  transaction_.take_back(from);
  if (from == n_tokens) return;
  const Growth growth{&cache, n_tokens - from};
  parts_.agents->reserve({&growth, 1}, true);  // a turn that is refused here would not be as it was
  compute_again(*parts_.model, cache, tokens);
  ++parts_.work.passes;
  ++parts_.work.turns;
  parts_.work.answer_tokens += n_tokens - from;
}

void EngineTurn::step(std::span<Scheduler::Step> steps, std::span<Scheduler::Turn* const> resting) {
  std::vector<EngineParts*> engines;
  for (const Scheduler::Step& step : steps) {
    EngineParts* const parts = &static_cast<EngineTurn*>(step.turn)->parts_;
    if (std::find(engines.begin(), engines.end(), parts) == engines.end()) engines.push_back(parts);
  }
  bool room = true;
  for (EngineParts* parts : engines) {
    std::vector<Scheduler::Step*> own;
    std::vector<EngineTurn*> others;
    const auto is_own = [&](Scheduler::Turn* turn) { return &static_cast<EngineTurn*>(turn)->parts_ == parts; };
    for (Scheduler::Step& step : steps) {
      if (!is_own(step.turn)) continue;
      own.push_back(&step);
      others.push_back(static_cast<EngineTurn*>(step.turn));
    }
    for (Scheduler::Turn* turn : resting) {
      if (is_own(turn)) others.push_back(static_cast<EngineTurn*>(turn));
    }
    step(*parts, own, others, room);
  }
}

void EngineTurn::step(EngineParts& parts, std::span<Scheduler::Step* const> steps, std::span<EngineTurn* const> others,
                      bool& room) {
  std::vector<Computing> turns;
  std::vector<int> left;  // of their prompts
  for (Scheduler::Step* const step : steps) {
    auto* const turn = static_cast<EngineTurn*>(step->turn);
    bool waits = false;
    try {
      turn->transaction_.bring_back();
      waits = turn->generation_.prompt_left() > 0 && turn->waits_for(turns, others);
    } catch (...) {
      step->error = std::current_exception();
      room = false;
      continue;
    }
    if (turn->generation_.over()) {
      step->computed = true;
      continue;
    }
    turns.push_back({turn, step, {}});
    left.push_back(waits ? -1 : turn->generation_.prompt_left());
  }
  const double cost = parts.row_cost.of(int(std::ranges::count(left, 0)));
  const std::vector<int> guesses = share_guesses(left, [&](size_t i, int most) {
    EngineTurn& turn = *turns[i].turn;
    return turn.generation_.guess(std::min(most, turn.transaction_.cache().spare_rows() - 1), cost);
  });
  const std::vector<int> shares = share(*parts.pace, turns, left, guesses);
  // By KV format. On MLX's backend rows have the bits of their pass: a prompt's have those that they would have alone.
  const bool parts_prompts = parts.model->backend() == Backend::kMlx;
  std::map<std::pair<bool, std::string>, std::vector<Computing>> batches;
  for (size_t i = 0; i < turns.size(); ++i) {
    auto& [turn, step, rows] = turns[i];
    rows = turn->generation_.next_rows(turn->up_to_stop(shares[i]));  // also of a prompt that has to wait: it may be cancelled
    step->computed = turn->generation_.over();
    if (rows.empty() || shares[i] == 0) continue;
    const Growth growth{&turn->transaction_.cache(), int(rows.size())};
    try {
      if (!room && growth.cache->growth(growth.rows) > 0) continue;
      parts.agents->reserve({&growth, 1});
    } catch (...) {
      step->error = std::current_exception();
      room = false;
      continue;
    }
    batches[{parts_prompts && left[i] > 0, turn->transaction_.agent().identity.kv}].push_back(turns[i]);
  }
  for (const auto& [kind, batch] : batches) {
    // In one chunk of MLX's backend at most, so that none has advanced when a pass fails.
    for (std::span<const Computing> rest = batch; !rest.empty();) {
      const std::span<const Computing> pass = rest.first(std::min(rest.size(), size_t(PrefillPace::kMost)));
      compute(parts, pass);
      rest = rest.subspan(pass.size());
    }
  }
}

void EngineTurn::commit() {
  const bool whole = transaction_.pending().empty();
  if (request_.agent.empty()) transaction_.keep_for_retry(false);  // a commit keeps its whole segments alone
  const GenerateResult generated = generation_.finish();
  result_.message = {.role = "assistant", .content = generated.text};
  if (request_.read_answer) {
    try {
      result_.message = request_.read_answer(generated.text);
      static_cast<void>(message_to_json(result_.message));  // what could not be saved is not kept
    } catch (...) {
      result_.message = {.role = "assistant", .content = generated.text};
    }
  }
  answer_states_.drop(transaction_.cache());
  transaction_.commit(result_.message, whole);
  committed_ = true;
  result_.text = generated.text;
  result_.finish_reason = generated.finish_reason;
  result_.tokens.prefilled = generated.prefilled;
  result_.tokens.generated = generated.generated;
  result_.tokens.proposed = generated.proposed;
  result_.tokens.accepted = generated.accepted;
  result_.stop = generated.stop;
  result_.logprobs = generated.logprobs;
  result_.tokens.context = transaction_.cache().length();
  result_.timing_ms.ttft = begin_ms_ + generated.prefill_ms;
  result_.timing_ms.decode = generated.decode_ms;

  const auto saving = Clock::now();
  outcome_.saving = transaction_.save(request_.save);
  result_.save_error = transaction_.save_error();
  result_.notices = transaction_.notices();
  if (request_.save != SaveMode::kNo) result_.timing_ms.save = ms_since(saving);
  if (transaction_.woke()) result_.bytes.read = transaction_.agent().bytes_read;
}

}  // namespace torpor
