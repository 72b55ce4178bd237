package check

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sort"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// ErrNotLinearizable is wrapped by Linearizable's error when the history could
// not have happened on one correct disk.
var ErrNotLinearizable = errors.New("the history is not linearizable")

// ErrUndecided is wrapped when the context ended before the search did.
var ErrUndecided = errors.New("the history was not decided in time")

// accountMaxOps bounds the operations an account of a bad block prints.
const accountMaxOps = 40

// Linearizable checks promise P1 on every block by itself: a history over
// independent registers is linearizable if and only if each register's part is
// (Herlihy and Wing 1990, locality). The search is porcupine's. A write of
// unknown outcome may take effect at any time until the end; an unknown read
// says nothing. The error holds an account of the first bad block.
func Linearizable(ctx context.Context, h *History) error {
	byBlock := map[uint64][]Op{}
	for _, op := range h.Ops() {
		if op.Kind == Flush || op.Kind == Read && op.Unknown {
			continue
		}
		byBlock[op.Block] = append(byBlock[op.Block], op)
	}
	blocks := make([]uint64, 0, len(byBlock))
	for b := range byBlock {
		blocks = append(blocks, b)
	}
	sort.Slice(blocks, func(i, j int) bool { return blocks[i] < blocks[j] })
	for _, b := range blocks {
		if err := checkBlock(ctx, b, narrowUnknown(byBlock[b])); err != nil {
			return err
		}
	}
	return nil
}

// narrowUnknown keeps the search small without changing its answer. A write of
// unknown outcome whose value nobody saw is left out: taken out of a valid
// order it leaves one, and it can always stand at the end. One whose value was
// seen took effect before the first answer that shows it. Zeroes are not
// unique, so a write of zeroes stays as it is.
func narrowUnknown(ops []Op) []Op {
	seenNs := map[Value]int64{}
	for _, op := range ops {
		if op.Kind != Read {
			continue
		}
		if at, ok := seenNs[op.Value]; !ok || op.ReturnNs < at {
			seenNs[op.Value] = op.ReturnNs
		}
	}
	out := make([]Op, 0, len(ops))
	for _, op := range ops {
		if op.Kind == Write && op.Unknown && op.Value != 0 {
			at, seen := seenNs[op.Value]
			if !seen {
				continue
			}
			// A value seen before it was written stays unknown: the search says so.
			if at >= op.InvokeNs {
				op.ReturnNs, op.Unknown = at, false
			}
		}
		out = append(out, op)
	}
	return out
}

func checkBlock(ctx context.Context, block uint64, ops []Op) error {
	switch decide(ctx, ops) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("%s with %d operations: %w", RegisterName(block), len(ops), ErrUndecided)
	}
	return fmt.Errorf("%s: %w\n%s", RegisterName(block), ErrNotLinearizable, account(ctx, ops))
}

// register is one block: state and inputs are values. A write without an
// answer is linearized anywhere in [invoke, ∞), which includes after the last
// read, where it is as if it had never been.
var register = porcupine.Model{
	Init: func() any { return Value(0) },
	Step: func(state, input, _ any) (bool, any) {
		op := input.(Op)
		if op.Kind == Write {
			return true, op.Value
		}
		return state.(Value) == op.Value, state
	},
}

func decide(ctx context.Context, ops []Op) porcupine.CheckResult {
	in := make([]porcupine.Operation, len(ops))
	for i, op := range ops {
		ret := op.ReturnNs
		if op.Unknown {
			ret = math.MaxInt64
		}
		in[i] = porcupine.Operation{ClientId: op.Client, Input: op, Call: op.InvokeNs, Return: ret}
	}
	var limit time.Duration // 0 = none
	if end, ok := ctx.Deadline(); ok {
		limit = max(time.Until(end), time.Nanosecond)
	}
	if ctx.Err() != nil {
		return porcupine.Unknown
	}
	return porcupine.CheckOperationsTimeout(register, in, limit)
}

// account tells a bad block's story: the obvious cause if there is one, then
// the shortest prefix (by return time) that already fails, its last operations.
func account(ctx context.Context, ops []Op) string {
	var b strings.Builder
	written := map[Value]bool{0: true}
	for _, op := range ops {
		if op.Kind == Write {
			written[op.Value] = true
		}
	}
	for _, op := range ops {
		if op.Kind != Read || written[op.Value] {
			continue
		}
		if op.Value == Torn {
			fmt.Fprintf(&b, "torn: %s saw bytes that were never written whole\n", describe(op))
		} else {
			fmt.Fprintf(&b, "invented: %s saw a value nobody wrote here\n", describe(op))
		}
		break
	}
	bad := shortestBadPrefix(ctx, ops)
	if n := len(bad) - accountMaxOps; n > 0 {
		fmt.Fprintf(&b, "(%d earlier operations left out)\n", n)
		bad = bad[n:]
	}
	for i, op := range bad {
		mark := "  "
		if i == len(bad)-1 {
			mark = "✗ " // without this answer the history is still possible
		}
		fmt.Fprintf(&b, "%s%s\n", mark, describe(op))
	}
	return b.String()
}

// shortestBadPrefix finds by bisection the first answer that makes the history
// impossible: a prefix by return time of a linearizable history is
// linearizable, when operations not yet answered count as unknown.
func shortestBadPrefix(ctx context.Context, ops []Op) []Op {
	byReturn := append([]Op(nil), ops...)
	end := func(op Op) int64 {
		if op.Unknown {
			return math.MaxInt64
		}
		return op.ReturnNs
	}
	sort.SliceStable(byReturn, func(i, j int) bool { return end(byReturn[i]) < end(byReturn[j]) })
	n := sort.Search(len(byReturn), func(n int) bool {
		return decide(ctx, prefix(byReturn, n+1)) == porcupine.Illegal
	})
	out := prefix(byReturn, min(n+1, len(byReturn)))
	last := byReturn[min(n, len(byReturn)-1)]
	// Invocation order reads best, with the answer that breaks it at the end.
	sort.SliceStable(out, func(i, j int) bool {
		if (out[i] == last) != (out[j] == last) {
			return out[j] == last
		}
		return out[i].InvokeNs < out[j].InvokeNs
	})
	return out
}

// prefix is the first n answers plus every write invoked before the last of
// them, as unknown.
func prefix(byReturn []Op, n int) []Op {
	out := append([]Op(nil), byReturn[:n]...)
	cut := byReturn[n-1].ReturnNs
	for _, op := range byReturn[n:] {
		if op.Kind == Write && op.InvokeNs <= cut {
			op.Unknown = true
			out = append(out, op)
		}
	}
	return out
}

func describe(op Op) string {
	end := fmt.Sprintf("%.6f", float64(op.ReturnNs)/1e9)
	if op.Unknown {
		end = "no answer"
	}
	return fmt.Sprintf("client %d %s %s [%.6f s … %s]", op.Client, op.Kind, op.Value, float64(op.InvokeNs)/1e9, end)
}
