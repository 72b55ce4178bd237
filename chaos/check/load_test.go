package check

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// memory is a correct disk with a volatile cache, or one with a planted bug.
// Its requests are atomic, so whatever a check finds was planted.
type memory struct {
	bug string

	mu      sync.Mutex
	now     []byte // guarded by mu
	stable  []byte // guarded by mu: what survives a power loss
	before  []byte // guarded by mu: the content some writes ago
	count   int    // guarded by mu: requests
	writes  int    // guarded by mu
	hang    chan struct{}
	waiting sync.Once
}

func newMemory(bug string, blocks int) *memory {
	n := blocks * BlockBytes
	return &memory{bug: bug, now: make([]byte, n), stable: make([]byte, n), before: make([]byte, n), hang: make(chan struct{})}
}

// plantEvery makes the planted bug strike once in so many requests.
const plantEvery = 97

// connection is a Device on a memory; it breaks once in breakEvery requests.
type connection struct {
	*memory
	breakEvery int
}

func (m *memory) dial(breakEvery int) func(context.Context) (Device, error) {
	return func(context.Context) (Device, error) { return &connection{m, breakEvery}, nil }
}

// step counts a request; done tells whether it takes effect, err what the
// client hears.
func (c *connection) step() (strike, done bool, err error) {
	c.count++
	strike = c.count%plantEvery == 0
	if strike && c.bug == "error" {
		return strike, false, errors.New("input/output error")
	}
	if c.breakEvery > 0 && c.count%c.breakEvery == 0 {
		return strike, c.count%(2*c.breakEvery) == 0, ErrDisconnected
	}
	return strike, true, nil
}

func (c *connection) ReadAt(p []byte, off int64) (int, error) {
	if c.bug == "hang" {
		<-c.hang
		return 0, ErrDisconnected
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	strike, _, err := c.step()
	if strike && c.bug == "stale read" {
		copy(p, c.before[off:])
	} else {
		copy(p, c.now[off:])
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *connection) write(p []byte, off int64, durable bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, done, err := c.step()
	if !done {
		return err
	}
	c.writes++
	strike := c.writes%plantEvery == 0
	if c.bug == "stale read" && strike {
		copy(c.before, c.now)
	}
	switch {
	case strike && c.bug == "lost write":
	case strike && c.bug == "torn write":
		copy(c.now[off:], p[:len(p)/2])
	case strike && c.bug == "misdirected write":
		copy(c.now[(off/BlockBytes+1)*BlockBytes:], p)
	case c.bug == "neighbour lost" && len(p) < BlockBytes && off%BlockBytes != 0:
		// Read-modify-write on a copy that was read too early: the parts
		// before it come back as they once were.
		block := off / BlockBytes * BlockBytes
		copy(c.now[off:], p)
		copy(c.now[block:off], c.stable[block:off])
	default:
		copy(c.now[off:], p)
	}
	if durable {
		copy(c.stable[off:], p)
	}
	return err
}

func (c *connection) WriteAt(p []byte, off int64) (int, error) {
	if err := c.write(p, off, false); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *connection) WriteFUA(p []byte, off int64) error {
	return c.write(p, off, c.bug != "FUA ignored")
}
func (c *connection) Trim(off, n int64) error        { return c.write(make([]byte, n), off, false) }
func (c *connection) WriteZeroes(off, n int64) error { return c.write(make([]byte, n), off, false) }

func (c *connection) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, done, err := c.step(); !done || err != nil || c.bug == "flush ignored" {
		return err
	}
	copy(c.stable, c.now)
	return nil
}

func (c *connection) Close() error {
	if c.bug == "hang" {
		c.waiting.Do(func() { close(c.hang) })
	}
	return nil
}

// crash is a power loss: each register keeps its stable content or any newer
// one.
func (m *memory) crash(rng *rand.Rand) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range spansOf(request{n: len(m.now)}) {
		if rng.IntN(2) == 0 {
			copy(m.now[s.off:][:s.n], m.stable[s.off:])
		}
	}
	copy(m.stable, m.now)
}

const testBlocks = 256

func testLoad(m *memory, seed uint64, breakEvery int) *Load {
	return NewLoad(Config{Dial: m.dial(breakEvery), Seed: seed, Blocks: testBlocks, Rate: 1_000_000, Ops: 6000})
}

// linearizable checks with a deadline, as every caller must.
func linearizable(t *testing.T, l *Load) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return Linearizable(ctx, l.History())
}

func TestLoadPassesOnACorrectDisk(t *testing.T) {
	for _, breakEvery := range []int{0, 311} {
		const base = 3 * BlockBytes
		m := newMemory("", 3+testBlocks)
		l := NewLoad(Config{Dial: m.dial(breakEvery), Seed: 1, Base: base, Blocks: testBlocks, Rate: 1_000_000, Ops: 6000})
		if err := l.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		held, err := l.ReadAll(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want := testBlocks + testBlocks/splitEvery*(partsPerBlock-1); len(held) != want {
			t.Errorf("ReadAll returned %d registers, want %d", len(held), want)
		}
		if err := linearizable(t, l); err != nil {
			t.Fatal(err)
		}
		if identify(m.now[:base], 1, 0) != 0 {
			t.Error("the load wrote before its base")
		}
		st := l.Stats()
		if broke := breakEvery > 0; (st.Reconnects > 0) != broke || (st.LongestOutageNs > 0) != broke {
			t.Errorf("%d reconnects with a break every %d requests", st.Reconnects, breakEvery)
		}
		for _, k := range st.Kinds {
			if k.Count == 0 || k.LongestNs == 0 {
				t.Errorf("%s: the load never did it: %+v", k.Kind, k)
			}
		}
	}
}

// Each planted bug must be found by the load or by the checker.
func TestLoadCatchesPlantedBugs(t *testing.T) {
	for _, c := range []struct{ bug, says string }{
		{"stale read", "not linearizable"},
		{"lost write", "not linearizable"},
		{"torn write", "is torn; bytes 0-"},
		{"misdirected write", "of no write to this place"},
		{"neighbour lost", "not linearizable"},
		{"error", "answered with an error"},
	} {
		t.Run(c.bug, func(t *testing.T) {
			l := testLoad(newMemory(c.bug, testBlocks), 2, 0)
			err := l.Run(t.Context())
			if err == nil {
				_, err = l.ReadAll(t.Context())
			}
			if err == nil {
				err = linearizable(t, l)
			}
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want %q", err, c.says)
			}
		})
	}
}

func TestLoadToleratesWhatItMay(t *testing.T) {
	m := newMemory("error", testBlocks)
	l := NewLoad(Config{Dial: m.dial(0), Seed: 5, Blocks: testBlocks, Rate: 1_000_000, Ops: 6000,
		Tolerate: func(err error) bool { return err.Error() == "input/output error" }})
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := linearizable(t, l); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, k := range l.Stats().Kinds {
		refused += k.Refused
	}
	if want := 6000 / plantEvery; refused != want {
		t.Errorf("%d errors were counted, %d were given", refused, want)
	}
	m.count = plantEvery - 1 // the first request of ReadAll is answered with an error
	held, err := l.ReadAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := held[0]; ok || len(held) == 0 {
		t.Errorf("ReadAll holds %d registers, the first one %v; it was answered with an error", len(held), ok)
	}
}

func TestLoadLosesPatience(t *testing.T) {
	m := newMemory("hang", testBlocks)
	l := NewLoad(Config{Dial: m.dial(0), Seed: 3, Blocks: testBlocks, Rate: 1_000_000, Patient: time.Millisecond})
	if err := l.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "got no answer in 1ms") {
		t.Fatalf("got %v from a disk that hangs", err)
	}
}

func TestLoadGivesUpOnADiskThatIsGone(t *testing.T) {
	gone := errors.New("connection refused")
	l := NewLoad(Config{Dial: func(context.Context) (Device, error) { return nil, gone }, Patient: time.Millisecond})
	if err := l.Run(t.Context()); !errors.Is(err, gone) {
		t.Fatalf("got %v, want the reason the disk cannot be reached", err)
	}
}

// A run that is told to stop while the disk is away has not failed.
func TestLoadStopsWhileTheDiskIsAway(t *testing.T) {
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		l := NewLoad(Config{Dial: func(context.Context) (Device, error) { cancel(); return nil, errors.New("connection refused") }, Rate: 1_000_000})
		if err := l.Run(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPowerLoss(t *testing.T) {
	for _, c := range []struct {
		bug  string
		want error
	}{{"", nil}, {"flush ignored", ErrNotDurable}, {"FUA ignored", ErrNotDurable}} {
		t.Run("bug "+c.bug, func(t *testing.T) {
			m := newMemory(c.bug, testBlocks)
			l := NewLoad(Config{Dial: m.dial(0), Seed: 4, Blocks: testBlocks, Rate: 1_000_000, Ops: 300})
			rng := rand.New(rand.NewPCG(4, 4))
			var found error
			for range 15 {
				if err := l.Run(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := linearizable(t, l); err != nil {
					t.Fatal(err)
				}
				before := l.History().Ops()
				m.crash(rng)
				held, err := l.ReadAll(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if found = Durable(before, held); found != nil {
					break
				}
				l.AfterPowerLoss(held)
			}
			if !errors.Is(found, c.want) {
				t.Fatalf("got %v, want %v", found, c.want)
			}
		})
	}
}

func TestDurable(t *testing.T) {
	fua := func(op Op) Op { op.Durable = true; return op }
	fl := func(from, to int64) Op { return Op{Kind: Flush, InvokeNs: from, ReturnNs: to} }
	for _, c := range []struct {
		name string
		ops  []Op
		held Value
		ok   bool
	}{
		{"nothing written", nil, 0, true},
		{"invented", nil, 7, false},
		{"unflushed may be lost", []Op{w(0, 1, 1, 2)}, 0, true},
		{"unflushed may be kept", []Op{w(0, 1, 1, 2)}, 1, true},
		{"flushed must be there", []Op{w(0, 1, 1, 2), fl(3, 4)}, 0, false},
		{"flush begun before the answer covers nothing", []Op{w(0, 1, 1, 3), fl(2, 4)}, 0, true},
		{"flush without an answer covers nothing", []Op{w(0, 1, 1, 2), unknown(fl(3, 0))}, 0, true},
		{"older than the flushed", []Op{w(0, 1, 1, 2), w(0, 2, 3, 4), fl(5, 6)}, 1, false},
		{"newer than the flushed", []Op{w(0, 1, 1, 2), fl(3, 4), w(0, 2, 5, 6)}, 2, true},
		{"overlapping writes, either one", []Op{w(0, 1, 1, 9), w(1, 2, 2, 8), fl(10, 11)}, 1, true},
		{"FUA is durable by itself", []Op{fua(w(0, 1, 1, 2))}, 0, false},
		{"FUA covers no other write", []Op{w(0, 1, 1, 2), fua(Op{Kind: Write, Block: 9, Value: 5, InvokeNs: 3, ReturnNs: 4})}, 0, true},
		{"unknown may have happened", []Op{w(0, 1, 1, 2), fl(3, 4), unknown(w(0, 2, 5, 0))}, 2, true},
		{"unknown before a flush may come after it", []Op{unknown(w(0, 2, 1, 0)), w(0, 1, 2, 3), fl(4, 5)}, 2, true},
		{"a flushed trim", []Op{w(0, 1, 1, 2), w(0, 0, 3, 4), fl(5, 6)}, 0, true},
		{"before a flushed trim", []Op{w(0, 1, 1, 2), w(0, 0, 3, 4), fl(5, 6)}, 1, false},
		{"torn", []Op{w(0, 1, 1, 2)}, Torn, false},
	} {
		if err := Durable(c.ops, map[uint64]Value{0: c.held}); (err == nil) != c.ok {
			t.Errorf("%s: got %v, want ok=%v", c.name, err, c.ok)
		}
	}
}

func TestContent(t *testing.T) {
	p := make([]byte, BlockBytes)
	for part, s := range append(spansOf(request{off: 7 * BlockBytes, n: BlockBytes}), span{register: 3, n: BlockBytes}) {
		v := Value(2<<ValueClientShift | 99)
		q := p[:s.n]
		fill(q, 5, s.register, v)
		if got := identify(q, 5, s.register); got != v {
			t.Fatalf("part %d: %s written, %s read", part, v, got)
		}
		for at := range q {
			q[at] ^= 0x10
			if got := identify(q, 5, s.register); got == v {
				t.Fatalf("part %d: a flipped bit in byte %d goes unseen", part, at)
			}
			q[at] ^= 0x10
		}
		if identify(q, 6, s.register) != Torn || identify(q, 5, s.register+1) != Torn {
			t.Fatalf("part %d: content of another run or place is taken", part)
		}
		fill(q, 5, s.register, 0)
		if got := identify(q, 5, s.register); got != 0 {
			t.Fatalf("part %d: zeroes are read as %s", part, got)
		}
	}
}

func TestChoiceIsTheSeeds(t *testing.T) {
	choices := func() (out []request) {
		l := NewLoad(Config{Seed: 8, Blocks: testBlocks})
		for range 1000 {
			r := l.workers[3].choose()
			if end := r.off + int64(r.n); end > testBlocks*BlockBytes {
				t.Fatalf("%+v goes beyond the area", r)
			}
			n := 0
			for _, s := range spansOf(r) {
				n += s.n
			}
			if n != r.n {
				t.Fatalf("%+v has registers of %d bytes", r, n)
			}
			out = append(out, r)
		}
		return out
	}
	a, b := choices(), choices()
	for i := range a {
		if a[i] != b[i] {
			t.Fatalf("choice %d differs: %+v, %+v", i, a[i], b[i])
		}
	}
}
