package check

import (
	"errors"
	"fmt"
	"sort"
)

// ErrNotDurable is wrapped by Durable's error when a register holds, after a
// power loss, what it must not hold.
var ErrNotDurable = errors.New("durability is broken")

// Durable checks promises P2 and P3 at one power loss: before is everything
// that was done until then, after what each register held at its first read
// since. Allowed is every value written that no durable write came wholly
// after; a write is durable when a flush begun after its answer was answered
// yes, or when it was itself answered under FUA. A write of unknown outcome may
// have happened or not. Registers missing in after are not judged; a Torn value
// never is allowed.
//
// A kill of processes alone must lose nothing at all: for that, Linearizable
// over the whole history is the check.
func Durable(before []Op, after map[uint64]Value) error {
	flushed := lastFlushNs(before)
	newest := map[uint64]Op{} // by register: the durable write invoked last
	for _, op := range before {
		if op.Kind != Write || op.Unknown || !(op.Durable || op.ReturnNs < flushed) {
			continue
		}
		if d, ok := newest[op.Block]; !ok || op.InvokeNs > d.InvokeNs {
			newest[op.Block] = op
		}
	}
	allowed := map[uint64]map[Value]bool{}
	for _, op := range before {
		if op.Kind != Write {
			continue
		}
		d, ok := newest[op.Block]
		if ok && !op.Unknown && op.ReturnNs < d.InvokeNs {
			continue // overwritten by what must have survived
		}
		if allowed[op.Block] == nil {
			allowed[op.Block] = map[Value]bool{}
		}
		allowed[op.Block][op.Value] = true
	}
	return judge(newest, allowed, after)
}

func judge(newest map[uint64]Op, allowed map[uint64]map[Value]bool, after map[uint64]Value) error {
	registers := make([]uint64, 0, len(after))
	for r := range after {
		registers = append(registers, r)
	}
	sort.Slice(registers, func(i, j int) bool { return registers[i] < registers[j] })
	for _, r := range registers {
		v := after[r]
		d, ok := newest[r]
		if allowed[r][v] || v == 0 && !ok {
			continue
		}
		if !ok {
			return fmt.Errorf("%s holds %s, which nobody wrote there, and nothing durable: %w", RegisterName(r), v, ErrNotDurable)
		}
		return fmt.Errorf("%s holds %s, but must hold %s or a value written later: %w\n%s",
			RegisterName(r), v, d.Value, ErrNotDurable, describe(d))
	}
	return nil
}

// lastFlushNs is the latest invocation of a flush that was answered.
func lastFlushNs(ops []Op) int64 {
	var at int64
	for _, op := range ops {
		if op.Kind == Flush && !op.Unknown {
			at = max(at, op.InvokeNs)
		}
	}
	return at
}
