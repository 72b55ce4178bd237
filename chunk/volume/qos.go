package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/pb"
)

// What a volume may do is bounded by two token buckets, operations and bytes.
// An operation starts while both have tokens, and may leave a debt: so none is
// too large to start, and the rate holds over any time longer than a burst.
// Those that must wait do so in order, in front of everything else; flushes
// and the end of an epoch never wait. Waiting operations are looked at with
// every step, and steps come at least every tick.
//
// Two bounds can hold: the volume's own, and its share of a host that promises
// some volumes a minimum (Share). The lower one counts.

// Share bounds a volume until the next one, per second; 0: no bound.
type Share struct{ IOPS, Bytes uint64 }

func (*Share) event() {}

const (
	defaultBurst = time.Second
	shareBurst   = 100 * time.Millisecond // of a Share that is the lower bound
)

// bucket holds tokens × 1e6, so that a microsecond's worth is whole.
type bucket struct {
	rate   int64 // tokens a second, ≤ maxRate; 0: no bound
	most   int64 // tokens, ≤ maxTokens
	tokens int64 // × 1e6; ≤ most × 1e6; below 0: a debt
}

// Higher bounds are none that could be reached; with these nothing overflows.
const (
	maxRate   = 1 << 40
	maxTokens = 1 << 42
)

// set changes the bound; what was saved up or owed stays within it.
func (b *bucket) set(rate uint64, burst time.Duration) {
	was := b.rate
	b.rate = int64(min(rate, maxRate))
	b.most = min(maxTokens, max(1, b.rate/1000*burst.Milliseconds()+b.rate%1000*burst.Milliseconds()/1000))
	if b.rate == 0 {
		b.tokens = 0
	} else if full := b.most * 1e6; was == 0 || b.tokens > full {
		b.tokens = full
	}
}

func (b *bucket) pass(us int64) {
	if b.rate == 0 {
		return
	}
	full := b.most * 1e6
	if room := full - b.tokens; us > room/b.rate {
		b.tokens = full
	} else {
		b.tokens += us * b.rate
	}
}

func (b *bucket) ready() bool { return b.rate == 0 || b.tokens > 0 }

func (b *bucket) take(n uint64) {
	if b.rate > 0 {
		b.tokens -= int64(n) * 1e6
	}
}

// throttle is the bounds of one volume and what waits for them.
type throttle struct {
	on         bool
	ops, bytes bucket
	at         time.Duration // tokens are counted up to then
	held       opQueue
	heldOps    int // ≤ what clients may have in flight
	waited     uint64
	qos        *pb.Qos
	share      Share

	// What clients have asked for and what was answered, flushes left out.
	asked, answered, answeredBytes uint64 // answered ≤ asked
}

// Claim tells what the volume is promised and has had, for a Sharer.
func (e *Engine) Claim() Claim {
	t := &e.throttle
	return Claim{Volume: e.volume, MinIOPS: t.qos.GetIopsMin(), MinBytes: t.qos.GetBytesPerSecondMin(),
		Ops: t.answered, Bytes: t.answeredBytes, Open: t.asked - t.answered}
}

// note counts an answered operation.
func (t *throttle) note(op *Op) {
	if op.Kind != OpFlush {
		_, bytes := cost(op)
		t.answered++
		t.answeredBytes += bytes
	}
}

// setQos takes over the volume's own bounds.
func (e *Engine) setQos(q *pb.Qos) {
	was := e.throttle.qos
	e.throttle.qos = q
	if q.GetIopsMax() == was.GetIopsMax() && q.GetBytesPerSecondMax() == was.GetBytesPerSecondMax() && q.GetBurstMs() == was.GetBurstMs() {
		return
	}
	e.setBuckets()
}

// setBuckets makes the buckets hold the lower of the two bounds.
func (e *Engine) setBuckets() {
	t := &e.throttle
	lower := func(a, b uint64) uint64 {
		if a == 0 || b > 0 && b < a {
			return b
		}
		return a
	}
	burst := time.Duration(t.qos.GetBurstMs()) * time.Millisecond
	if burst == 0 {
		burst = defaultBurst
	}
	if !t.on {
		t.at = e.now
	}
	t.refill(e.now)
	for _, x := range []struct {
		b          *bucket
		own, share uint64
	}{{&t.ops, t.qos.GetIopsMax(), t.share.IOPS}, {&t.bytes, t.qos.GetBytesPerSecondMax(), t.share.Bytes}} {
		rate, most := lower(x.own, x.share), burst
		if rate > 0 && rate == x.share {
			most = min(burst, shareBurst)
		}
		x.b.set(rate, most)
	}
	t.on = t.ops.rate > 0 || t.bytes.rate > 0 || t.held.head != nil
}

func (t *throttle) refill(now time.Duration) {
	if us := int64((now - t.at) / time.Microsecond); us > 0 {
		t.ops.pass(us)
		t.bytes.pass(us)
		t.at += time.Duration(us) * time.Microsecond
	}
}

// cost is what an operation takes: what is only noted costs no bytes.
func cost(op *Op) (ops, bytes uint64) {
	if op.Kind == OpWrite || op.Kind == OpRead && op.States == nil {
		return 1, op.Len
	}
	return 1, 0
}

// hold keeps an operation that must wait; false: it may start.
func (e *Engine) hold(op *Op) bool {
	t := &e.throttle
	if !t.on || op.Kind == OpFlush || op.Tail {
		return false
	}
	t.refill(e.now)
	if t.held.head == nil && t.start(op) {
		return false
	}
	t.held.push(op)
	t.heldOps++
	t.waited++
	return true
}

// start takes the tokens of an operation, if it may begin.
func (t *throttle) start(op *Op) bool {
	if !t.ops.ready() || !t.bytes.ready() {
		return false
	}
	ops, bytes := cost(op)
	t.ops.take(ops)
	t.bytes.take(bytes)
	return true
}

// releaseHeld starts what may start by now.
func (e *Engine) releaseHeld() {
	t := &e.throttle
	if !t.on || t.held.head == nil {
		return
	}
	t.refill(e.now)
	for op := t.held.head; op != nil && t.start(op); op = t.held.head {
		if t.held.head = op.next; t.held.head == nil {
			t.held.tail = nil
		}
		op.next = nil
		t.heldOps--
		e.admit(op)
	}
}
