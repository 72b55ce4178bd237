// Package check records what clients of a block device saw and decides whether
// it could have happened on one correct disk.
//
// Duty: a history of block reads and writes (History), the verified load that
// makes one (Load), and the checkers of promises P1 (Linearizable), P2 and P3
// (Durable). Floor: F5. It starts no process and breaks nothing.
package check

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"
)

// Kind says what an operation did to its block.
type Kind uint8

// The kinds of operation in a history.
const (
	Read  Kind = iota // Value is what was seen
	Write             // Value is what was written
	Flush             // Block and Value mean nothing
)

func (k Kind) String() string {
	switch k {
	case Read:
		return "read"
	case Write:
		return "write"
	case Flush:
		return "flush"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Value names one block content. Zero is "all zero bytes": a block never
// written, or trimmed. Every write uses a value never used before.
type Value uint64

// Torn is the value of a read whose bytes are no content ever written whole.
const Torn = ^Value(0)

// String names the value as Load counts them: client.number.
func (v Value) String() string {
	switch v {
	case 0:
		return "zeroes"
	case Torn:
		return "torn bytes"
	}
	return fmt.Sprintf("%d.%d", uint64(v)>>ValueClientShift, uint64(v)&(1<<ValueClientShift-1))
}

// ValueClientShift is where a Value has its client; it leaves each client 2^40 values of its own.
const ValueClientShift = 40

// Op is one operation on one register: a whole block, or a part of one
// (RegisterName tells). Times are monotonic nanoseconds since the
// history began; InvokeNs ≤ ReturnNs. Unknown means no answer arrived: a read
// then says nothing, a write may take effect at any time after InvokeNs.
type Op struct {
	Client   int    `json:"client"`
	Kind     Kind   `json:"kind"`
	Block    uint64 `json:"block"`
	Value    Value  `json:"value"`
	InvokeNs int64  `json:"invokeNs"`
	ReturnNs int64  `json:"returnNs"`
	Unknown  bool   `json:"unknown,omitempty"`
	Durable  bool   `json:"durable,omitempty"` // a write with FUA: its answer says it is on stable storage
}

// History collects operations from many goroutines. Operations begun and never
// finished count as unknown. It grows by one Op (64 bytes) per Begin and has
// no other bound than the run's length.
type History struct {
	start time.Time

	mu  sync.Mutex
	ops []Op // guarded by mu
}

// NewHistory starts an empty history; its clock starts now.
func NewHistory() *History { return &History{start: time.Now()} }

// Begin records the invocation of an operation and returns its token for End.
// For a write, v is the value written; for a read it is ignored.
func (h *History) Begin(client int, k Kind, block uint64, v Value) int {
	return h.begin(Op{Client: client, Kind: k, Block: block, Value: v})
}

func (h *History) begin(op Op) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	// The clock is read under the lock, so tokens stand in invocation order.
	op.InvokeNs, op.Unknown = time.Since(h.start).Nanoseconds(), true
	h.ops = append(h.ops, op)
	return len(h.ops) - 1
}

// End records a positive answer. For a read, v is the value seen.
func (h *History) End(token int, v Value) {
	now := time.Since(h.start).Nanoseconds()
	h.mu.Lock()
	defer h.mu.Unlock()
	op := &h.ops[token]
	op.ReturnNs, op.Unknown = now, false
	if op.Kind == Read {
		op.Value = v
	}
}

// endAll ends several entries at one instant: the answer came once for all.
// For a flush, values may be empty.
func (h *History) endAll(tokens []int, values []Value) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Since(h.start).Nanoseconds()
	for i, token := range tokens {
		op := &h.ops[token]
		op.ReturnNs, op.Unknown = now, false
		if op.Kind == Read {
			op.Value = values[i]
		}
	}
}

// Add appends an operation with times of the caller's making.
func (h *History) Add(op Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

// Ops returns a copy of all operations in order of Begin.
func (h *History) Ops() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Op(nil), h.ops...)
}

// Save writes the history to a file as JSON, one operation a line.
func (h *History) Save(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("the history cannot be saved: %w", err)
	}
	enc := json.NewEncoder(f)
	for _, op := range h.Ops() {
		if err := enc.Encode(op); err != nil {
			return fmt.Errorf("the history cannot be saved to %s: %w", name, firstError(err, f.Close()))
		}
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("the history cannot be saved to %s: %w", name, err)
	}
	return nil
}

// LoadHistory reads a file written by Save, for checking it again.
func LoadHistory(name string) (*History, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("the history cannot be read: %w", err)
	}
	defer f.Close()
	h := NewHistory()
	for dec := json.NewDecoder(f); dec.More(); {
		var op Op
		if err := dec.Decode(&op); err != nil {
			return nil, fmt.Errorf("%s is not a saved history: %w", name, err)
		}
		h.ops = append(h.ops, op)
	}
	return h, nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// NowNs is the history's clock.
func (h *History) NowNs() int64 { return time.Since(h.start).Nanoseconds() }

// Longest is the longest time an answered operation took of those that were in
// flight at some moment from fromNs to toNs.
func (h *History) Longest(fromNs, toNs int64) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	longest := int64(0)
	for _, op := range h.ops {
		if !op.Unknown && op.InvokeNs <= toNs && op.ReturnNs >= fromNs {
			longest = max(longest, op.ReturnNs-op.InvokeNs)
		}
	}
	return time.Duration(longest)
}

// FirstAnswer is the earliest answer, at or after fromNs, to an operation begun
// then; ok is false when there is none yet.
func (h *History) FirstAnswer(fromNs int64) (atNs int64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, op := range h.ops {
		if !op.Unknown && op.InvokeNs >= fromNs && (!ok || op.ReturnNs < atNs) {
			atNs, ok = op.ReturnNs, true
		}
	}
	return atNs, ok
}
