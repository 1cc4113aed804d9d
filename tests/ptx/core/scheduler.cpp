#include "scheduler.h"

#include "block.h"

namespace {

class Scheduler {
   public:
    Scheduler(const Code& code, int entry, const StartRegisters& registers, const std::vector<Parameter>& parameters,
              const Grid& grid, Ranges ranges, const Settings& settings)
        : code_(code), entry_(entry), registers_(registers), parameters_(parameters), grid_(grid), settings_(settings),
          random_(settings.seed), memory_(std::move(ranges), settings.weak, races(code, settings), random_),
          multiprocessors_(settings.multiprocessors) {
        const uint64_t n = std::min<uint64_t>(settings.at_once, grid.total());
        for (uint64_t i = 0; i < n; ++i) {
            Multiprocessor& multiprocessor = multiprocessors_[i % multiprocessors_.size()];
            blocks_.push_back(std::make_unique<Block>(memory_, multiprocessor, code, i));
        }
    }

    uint64_t run() {
        for (const auto& block : blocks_) start(*block);
        while (!blocks_.empty()) {
            const size_t chosen = pick(blocks_.size());
            Block& block = *blocks_[chosen];
            take_turn(block);
            if (!block.running) finish(chosen);
            if (steps_ - last_change_ > settings_.patience)
                throw Trap("livelock: memory has not changed for long, in " + place(block, *block.warps[0]));
        }
        return steps_;
    }

   private:
    static std::optional<ProgramRaces> races(const Code& code, const Settings& settings) {
        if (!settings.ordered) return std::nullopt;
        return ProgramRaces(settings.at_once, code.n_warps());
    }

    size_t pick(size_t n) { return n == 1 ? 0 : random_() % n; }

    void start(Block& block) {
        if (started_ == grid_.total()) return;
        block.number = started_++;
        block.running = true;
        block.shared.clear();
        memory_.start(block);
        ++block.epoch;
        const uint64_t* size = grid_.size;
        const uint64_t n = block.number;
        const uint64_t place[3] = {n % size[0], n / size[0] % size[1], n / size[0] / size[1]};
        for (const auto& warp : block.warps) {
            warp->start(entry_);
            warp->set_lane_numbers(registers_.thread, registers_.lane);
            for (int i = 0; i < 3; ++i) {
                warp->set_everywhere(registers_.program[i], place[i]);
                warp->set_everywhere(registers_.grid[i], size[i]);
            }
            for (const Parameter& parameter : parameters_) warp->set_everywhere(parameter.reg, parameter.value);
        }
    }

    // Lets one warp that can go on do so for a while.
    void take_turn(Block& block) {
        const size_t n = block.warps.size();
        const size_t first = pick(n);
        bool went = false;
        for (size_t i = 0; i < n && !went; ++i) went = go(*block.warps[(first + i) % n]);
        if (settings_.weak) memory_.let_time_pass(block);
        if (!went) meet(block);
    }

    bool go(Warp& warp) {
        const uint64_t most = 1 + pick(settings_.turn);
        const uint64_t before = memory_.changes();
        uint64_t n = 0;
        try {
            while (n < most && warp.step()) ++n;
        } catch (const Trap& trap) {
            throw Trap(std::string(trap.what()) + ", in " + place(warp.block, warp));
        }
        steps_ += n;
        if (memory_.changes() != before) last_change_ = steps_;
        return n > 0;
    }

    // No warp can go on: they have all ended, or have met at a barrier.
    void meet(Block& block) {
        size_t ended = 0, waiting = 0;
        for (const auto& warp : block.warps) {
            ended += warp->ended();
            waiting += warp->at_barrier();
        }
        const size_t n = block.warps.size();
        if (ended == n) {
            block.running = false;
            return;
        }
        if (waiting != n) {
            for (const auto& warp : block.warps) {
                if (warp->ended()) continue;
                throw Trap("deadlock: some wait for others that never come, in " + place(block, *warp));
            }
        }
        memory_.barrier(block);
        ++block.epoch;
        for (const auto& warp : block.warps) warp->pass_barrier();
    }

    void finish(size_t chosen) {
        Block& block = *blocks_[chosen];
        memory_.finish(block);
        start(block);
        if (block.running) return;
        std::erase(block.multiprocessor.pending, &block.stores);
        blocks_.erase(blocks_.begin() + chosen);
    }

    std::string place(const Block& block, const Warp& warp) const {
        const std::string line = warp.current() ? std::to_string(warp.current()->line) : "0";
        return "line " + line + ", program " + std::to_string(block.number) + ", warp " + std::to_string(warp.number);
    }

    const Code& code_;
    const int entry_;
    const StartRegisters& registers_;
    const std::vector<Parameter>& parameters_;
    const Grid& grid_;
    const Settings& settings_;
    std::mt19937_64 random_;
    GlobalMemory memory_;
    std::vector<Multiprocessor> multiprocessors_;
    std::vector<std::unique_ptr<Block>> blocks_;  // those that are running
    uint64_t started_ = 0, steps_ = 0, last_change_ = 0;
};

}  // namespace

uint64_t run_grid(const Code& code, int entry, const StartRegisters& registers,
                  const std::vector<Parameter>& parameters, const Grid& grid, Ranges ranges, const Settings& settings) {
    return Scheduler(code, entry, registers, parameters, grid, std::move(ranges), settings).run();
}
