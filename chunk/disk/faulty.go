package disk

import (
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Faulty is a disk over another that does wrong what its rules say. What it
// does is decided by the rules, the seed and the order of operations alone.
type Faulty struct {
	under Disk
	after func(time.Duration, func()) // runs a slow operation when its time has come

	mu    sync.Mutex // guards the fields below
	rules Rules
	fit   []uint64 // by rule: how many operations its kind and where have fitted
	hit   []uint64 // by rule: how many it decided
	rng   *rand.Rand
	held  []*Op // hanging
	done  bool
	slow  sync.WaitGroup
}

var (
	_ Disk      = (*Faulty)(nil)
	_ Immediate = (*Faulty)(nil)
)

// NewFaulty returns a disk over under, which it closes when it is closed. seed
// decides what P% hits.
func NewFaulty(under Disk, rules Rules, seed uint64) *Faulty {
	f := &Faulty{under: under, rng: rand.New(rand.NewPCG(seed, 7)), after: func(d time.Duration, do func()) { time.AfterFunc(d, do) }}
	f.SetRules(rules)
	return f
}

// SetRules replaces the rules; counting begins anew.
func (f *Faulty) SetRules(rules Rules) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules, f.fit, f.hit = rules, make([]uint64, len(rules)), make([]uint64, len(rules))
}

// Hits returns how many operations each rule has decided.
func (f *Faulty) Hits() []uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]uint64(nil), f.hit...)
}

// Size returns the size in bytes.
func (f *Faulty) Size() int64 { return f.under.Size() }

// Close does what hangs, waits for what is slow, and closes the disk below.
func (f *Faulty) Close() error {
	f.mu.Lock()
	f.done = true
	held := f.held
	f.held = nil
	f.mu.Unlock()
	for _, op := range held {
		f.under.Submit(op)
	}
	f.slow.Wait()
	return f.under.Close()
}

// ReadNow answers from memory unless some rule is about reads.
func (f *Faulty) ReadNow(b []byte, off int64) bool {
	now, ok := f.under.(Immediate)
	if !ok {
		return false
	}
	f.mu.Lock()
	for _, r := range f.rules {
		ok = ok && !r.Any && r.Kind != Read
	}
	f.mu.Unlock()
	return ok && now.ReadNow(b, off)
}

// Submit starts op, or what the rules make of it.
func (f *Faulty) Submit(op *Op) {
	r := f.decide(op)
	if r == nil {
		f.under.Submit(op)
		return
	}
	switch r.Effect {
	case Fails:
		op.Done(explain(op, r.Errno))
	case Lost:
		op.Done(nil)
	case Misdirected:
		f.misdirect(op, r.N)
	case Flips:
		f.flip(op, r.N)
	case Torn:
		f.tear(op, r.N)
	case Slow:
		f.after(r.Delay, func() {
			f.under.Submit(op)
			f.slow.Done()
		})
	}
}

// decide returns the rule for op, or nil. What hangs is kept already, what is
// slow is counted.
func (f *Faulty) decide(op *Op) *Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	end := op.Off + total(op.Bufs) + op.Len
	var chosen *Rule
	for i := range f.rules {
		r := &f.rules[i]
		if !r.Any && r.Kind != op.Kind || r.To > 0 && (op.Kind == Sync || end <= r.From || op.Off >= r.To) {
			continue
		}
		f.fit[i]++
		n := f.fit[i]
		if chosen != nil || n < r.First || n > r.Last || r.Every > 0 && (n-r.First+1)%r.Every != 0 {
			continue
		}
		if r.Percent > 0 && f.rng.Float64()*100 >= r.Percent {
			continue
		}
		f.hit[i]++
		chosen = r
	}
	switch {
	case chosen == nil:
	case chosen.Effect == Hangs && f.done:
		return nil
	case chosen.Effect == Hangs:
		f.held = append(f.held, op)
	case chosen.Effect == Slow:
		f.slow.Add(1)
	}
	return chosen
}

// misdirect does op n bytes further on, in whole sectors, round the end.
func (f *Faulty) misdirect(op *Op, n int64) {
	length := total(op.Bufs)
	room := f.Size() - length
	if err := op.inside(f.Size()); err != nil || room <= 0 {
		op.Done(err)
		return
	}
	off := op.Off + n/SectorBytes*SectorBytes
	if off > room {
		off %= room + 1
		off -= off % SectorBytes
	}
	f.under.Submit(&Op{Kind: op.Kind, Direct: op.Direct, Off: off, Bufs: op.Bufs, Done: op.Done})
}

// flip inverts one bit: of what is written, in a copy; of what was read.
func (f *Faulty) flip(op *Op, bit int64) {
	length := total(op.Bufs)
	if length == 0 {
		f.under.Submit(op)
		return
	}
	bit %= length * 8
	invert := func(bufs [][]byte) {
		at := bit / 8
		for _, b := range bufs {
			if at < int64(len(b)) {
				b[at] ^= 1 << (bit % 8)
				return
			}
			at -= int64(len(b))
		}
	}
	bad := *op
	if op.Kind == Write {
		bad.Bufs = make([][]byte, len(op.Bufs))
		for i, b := range op.Bufs {
			bad.Bufs[i] = append([]byte(nil), b...)
		}
		invert(bad.Bufs)
	} else {
		bad.Done = func(err error) {
			if err == nil {
				invert(op.Bufs)
			}
			op.Done(err)
		}
	}
	f.under.Submit(&bad)
}

// tear writes the first n bytes, in whole sectors, and fails.
func (f *Faulty) tear(op *Op, n int64) {
	left := min(n/SectorBytes*SectorBytes, total(op.Bufs))
	part := &Op{Kind: Write, Off: op.Off, Done: func(err error) {
		if err == nil {
			err = status.Errorf(status.IO, "write at %d stopped in the middle: %w", op.Off, syscall.EIO)
		}
		op.Done(err)
	}}
	for _, b := range op.Bufs {
		m := min(left, int64(len(b)))
		part.Bufs = append(part.Bufs, b[:m])
		left -= m
	}
	f.under.Submit(part)
}
