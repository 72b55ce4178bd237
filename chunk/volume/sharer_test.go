package volume

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// machine is what volumes compete for: so many units a second, given to them by
// how many operations each has waiting, and to none more than its bound. A volume
// that waits for each answer gets no more than its depth over the latency.
type machine struct {
	units float64
	now   time.Duration
	s     Sharer
	vs    []*load
	had   []float64 // operations each finished in this run
	held  []Share
}

type load struct {
	claim   Claim
	depth   float64
	opBytes float64
	most    float64 // operations a second it can ask for; 0: any number
	had     float64
}

func newMachine(units float64, vs ...*load) *machine {
	for i, v := range vs {
		v.claim.Volume = ids.VolumeID(i + 1)
	}
	return &machine{units: units, vs: vs, had: make([]float64, len(vs)), held: make([]Share, len(vs))}
}

// give shares out what there is for a moment.
func (m *machine) give(dt float64) {
	want := make([]float64, len(m.vs)) // units a second, at most
	for i, v := range m.vs {
		one := units(1, v.opBytes)
		want[i] = 1e12
		if v.most > 0 {
			want[i] = v.most * one
		}
		if h := m.held[i]; h.IOPS > 0 {
			want[i] = min(want[i], float64(h.IOPS)*one)
		}
		if h := m.held[i]; h.Bytes > 0 && v.opBytes > 0 {
			want[i] = min(want[i], float64(h.Bytes)/v.opBytes*one)
		}
		if v.depth == 0 {
			want[i] = 0
		}
	}
	left, got := m.units, make([]float64, len(m.vs))
	for range m.vs { // fills up those that want less than their part
		depth := 0.0
		for i, v := range m.vs {
			if got[i] < want[i] {
				depth += v.depth
			}
		}
		if depth == 0 || left < 1e-9 {
			break
		}
		round := left
		for i, v := range m.vs {
			if got[i] < want[i] {
				x := min(want[i]-got[i], round*v.depth/depth)
				got[i] += x
				left -= x
			}
		}
	}
	for i, v := range m.vs {
		v.had += got[i] / units(1, v.opBytes) * dt
		m.had[i] += got[i] / units(1, v.opBytes) * dt
	}
}

// run lets time pass, and returns each volume's operations a second of it.
func (m *machine) run(span time.Duration) []float64 {
	const tick = 10 * time.Millisecond
	clear(m.had)
	for end := m.now + span; m.now < end; {
		m.now += tick
		m.give(tick.Seconds())
		claims := make([]Claim, len(m.vs))
		for i, v := range m.vs {
			c := &v.claim
			c.Ops, c.Bytes, c.Open = uint64(v.had), uint64(v.had*v.opBytes), uint64(v.depth)
			claims[i] = *c
		}
		if held := m.s.Step(m.now, claims); held != nil {
			m.held = held
		}
	}
	out := make([]float64, len(m.had))
	for i := range out {
		out[i] = m.had[i] / span.Seconds()
	}
	return out
}

func (m *machine) bounded() bool {
	for _, h := range m.held {
		if h != (Share{}) {
			return true
		}
	}
	return false
}

// A promise is kept within seconds, the rest is used, and nobody is held when
// there is no need.
func TestAPromisedMinimumIsKept(t *testing.T) {
	quiet := &load{claim: Claim{MinIOPS: 1000}, depth: 4, opBytes: 4096}
	m := newMachine(8000, quiet, &load{depth: 64, opBytes: 4096}, &load{depth: 64, opBytes: 1 << 20}, &load{depth: 1, opBytes: 4096})
	m.vs[0].claim.MinIOPS = 0
	if r := m.run(5 * time.Second); r[0] > 250 || m.bounded() {
		t.Fatalf("without a promise it gets %.0f (bounded: %v): the test has no contention", r[0], m.bounded())
	}
	m.vs[0].claim.MinIOPS = 1000
	m.run(4 * time.Second)
	r := m.run(20 * time.Second)
	if r[0] < 970 {
		t.Errorf("promised 1000, it gets %.0f (others %.0f)", r[0], r[1:])
	}
	used := 0.0
	for i, v := range m.vs {
		used += r[i] * units(1, v.opBytes)
	}
	if used < 0.8*m.units {
		t.Errorf("of %.0f only %.0f are used (%.0f)", m.units, used, r)
	}
	quiet.depth = 0 // it asks for nothing, and is owed nothing
	m.run(10 * time.Second)
	if m.bounded() {
		t.Errorf("the others are still held to %+v", m.held)
	}
	quiet.depth, quiet.most = 4, 100 // it asks for little, and gets it
	m.units = 1e6
	m.run(2 * time.Second)
	if r = m.run(20 * time.Second); r[0] < 99 {
		t.Errorf("it asks for 100 and gets %.0f", r[0])
	}
}

// A volume that is slow by itself does not hold its neighbours back for long.
func TestAPromiseNobodyCanKeepIsLetBe(t *testing.T) {
	m := newMachine(8000, &load{claim: Claim{MinIOPS: 5000}, depth: 8, opBytes: 4096, most: 60}, &load{depth: 64, opBytes: 4096})
	m.run(20 * time.Second)
	r := m.run(5 * time.Minute)
	alone := m.units / units(1, 4096)
	if r[1] < 0.85*alone {
		t.Errorf("the neighbour of a volume that does 60 at most gets %.0f of %.0f", r[1], alone)
	}
}

// More promised than there is: all that are promised something get their part,
// and whoever is promised nothing keeps a little.
func TestMorePromisedThanThereIs(t *testing.T) {
	m := newMachine(4000, &load{claim: Claim{MinIOPS: 4000}, depth: 16}, &load{claim: Claim{MinIOPS: 4000}, depth: 16}, &load{depth: 64})
	m.run(10 * time.Second)
	r := m.run(20 * time.Second)
	if r[0] < 1500 || r[1] < 1500 || r[2] < shareLeast-1 || r[2] > 1000 {
		t.Errorf("of 4000: %.0f", r)
	}
}

// A minimum of bytes counts too, and either keeps a promise of both.
func TestAPromiseOfBytes(t *testing.T) {
	m := newMachine(8000, &load{claim: Claim{MinBytes: 32 << 20, MinIOPS: 1 << 30}, depth: 1, opBytes: 64 << 10}, &load{depth: 64, opBytes: 4096})
	m.run(4 * time.Second)
	if r := m.run(20 * time.Second); r[0]*(64<<10) < 0.97*(32<<20) {
		t.Errorf("promised 32 MiB/s it gets %.1f MiB/s", r[0]/16)
	}
}

// An engine counts what it owes to a Sharer, and a Share holds from one moment to
// the next, without the second's burst of its own bound.
func TestClaimAndShareOfAnEngine(t *testing.T) {
	w := slowed(t, &pb.Qos{IopsMin: 7, BytesPerSecondMin: 9})
	before := w.e.Claim()
	answers := map[*Op][]status.Kind{}
	read := func() {
		w.tally(&Op{Kind: OpRead, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, answers)
	}
	answered := func() (n int) {
		for _, ks := range answers {
			n += len(ks)
		}
		return n
	}
	w.step(&Share{IOPS: 20})
	for range 10 {
		read()
	}
	c := w.e.Claim()
	if done := answered(); done != 2 || c.MinIOPS != 7 || c.MinBytes != 9 || c.Ops-before.Ops != 2 || c.Bytes-before.Bytes != 2*ids.BlockSize || c.Open != 8 {
		t.Fatalf("a tenth of a second of 20: %d done, claim %+v, before %+v", done, c, before)
	}
	w.step(&Share{})
	if c, done := w.e.Claim(), answered(); done != 10 || c.Open != 0 {
		t.Fatalf("without a share: %d done, claim %+v", done, c)
	}
}
