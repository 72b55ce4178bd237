package sim

import (
	"fmt"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// The volume: four chunks of 1 MiB, of which the load uses few blocks, so that
// operations meet; those of the first window are many, and meet rarely. Blocks of the windows are registers as a whole; those of the
// last window are written in parts, and each sector is a register.
const (
	chunkBytes  = 1 << 20
	chunkBlocks = chunkBytes / ids.BlockSize
	volumeBytes = 4 * chunkBytes
	sectorBytes = 512
	sectors     = ids.BlockSize / sectorBytes
)

// maxDepth bounds the operations a client has in flight, but for its reader's.
const maxDepth = 12

type window struct {
	first, count uint64
	parts        bool
}

var windows = []window{{first: 60, count: 100}, {first: chunkBlocks - 6, count: 12}, {first: 2 * chunkBlocks, count: 6}, {first: 3*chunkBlocks - 1, count: 3, parts: true}}

// load is all the clients together.
type load struct {
	w       *world
	begun   int // operations, of cfg.Steps
	value   uint64
	depth   int           // operations in flight of each client
	think   time.Duration // mean pause between two
	clients []*client
}

func newLoad(w *world) *load {
	return &load{w: w, depth: 1 + w.rng.IntN(maxDepth), think: []time.Duration{2, 10, 40, 150}[w.rng.IntN(4)] * time.Millisecond}
}

func (l *load) start()     { l.w.faults.begun(0) }
func (l *load) over() bool { return l.begun >= l.w.cfg.Steps }
func (l *load) reset()     {}

// outstanding counts operations not answered, of clients that can be.
func (l *load) outstanding() int {
	n := 0
	for _, c := range l.clients {
		n += c.busy()
	}
	return n
}

func (l *load) idle() bool { return l.outstanding() == 0 }

// flushed flushes the volume, after everything else is answered.
func (l *load) flushed() bool {
	a := l.w.boss.serving()
	if a == nil {
		l.w.violate("converge", "nobody serves: %s", l.w.picture())
		return false
	}
	o := a.client.submit(&volume.Op{Kind: volume.OpFlush}, false)
	if !l.w.runUntil(l.w.now+healWithin, func() bool { return o.over }) {
		l.w.violate("P7", "a flush of a healthy cluster is not answered: %s", l.w.picture())
		return false
	}
	if o.status != status.OK {
		l.w.violate("P7", "a flush of a healthy cluster fails: %s", o.status)
		return false
	}
	return true
}

// client is a guest on one attachment.
type client struct {
	w    *world
	a    *attachment
	live []*op
	gone bool // what is not answered never will be
}

// op is one operation of a client, from invocation to answer.
type op struct {
	volume.Op
	c      *client
	inv    uint64
	at     time.Duration
	vals   []*value // of a write: what each register gets
	over   bool
	status status.Kind
	reader bool              // it is the reader's
	then   func(status.Kind) // hears the answer; may be nil
}

func newClient(w *world, a *attachment) *client {
	c := &client{w: w, a: a}
	w.load.clients = append(w.load.clients, c)
	return c
}

func (c *client) busy() int {
	if c.gone {
		return 0
	}
	return len(c.live)
}

func (c *client) start() {
	c.next(true)
	for range c.w.load.depth {
		c.next(false)
	}
}

// next begins the client's next operation after a while. The reader goes on
// whether its reads are answered or not: a writer that is cut off would soon have
// nothing but writes that wait, and reads of what they write.
func (c *client) next(reader bool) {
	l := c.w.load
	c.w.after(c.w.span(0, 2*l.think), func() {
		st := c.a.e.State()
		if c.gone || c.a.dead || st == volume.Ended || l.over() {
			return
		}
		if c.a.g.pausedUntil > c.w.now || st == volume.Draining {
			c.next(reader) // a client that gets no answers sends no more; a hand-over may be given up
			return
		}
		l.begun++
		c.w.faults.begun(l.begun)
		if c.gone || c.a.dead {
			return
		}
		o := l.draw()
		for reader && o.Kind != volume.OpRead {
			o = l.draw()
		}
		if reader {
			o.Len = min(o.Len, ids.BlockSize)
			o.States = o.States[:min(len(o.States), 1)]
			c.next(true)
			if len(c.live) > 4*maxDepth {
				return
			}
		}
		c.submit(o, reader)
	})
}

// draw makes an operation.
func (l *load) draw() *volume.Op {
	r := l.w.rng
	win := windows[r.IntN(len(windows))]
	first := win.first + r.Uint64N(win.count)
	n := min(1+r.Uint64N(4), win.first+win.count-first)
	o := &volume.Op{Off: first * ids.BlockSize, Len: n * ids.BlockSize}
	if r.IntN(100) < l.w.shape.flushes {
		return &volume.Op{Kind: volume.OpFlush}
	}
	switch k := r.IntN(100); {
	case k < 4 && !win.parts:
		o.States = make([]byte, n)
		return o
	case k < 46:
		o.Kind = volume.OpRead
	case r.IntN(100) >= l.w.shape.zeros:
		o.Kind, o.FUA = volume.OpWrite, l.w.shape.flushes > 0 && l.w.chance(10)
	case k%2 == 0:
		o.Kind = volume.OpZero
	default:
		o.Kind = volume.OpTrim
	}
	if win.parts && o.Kind != volume.OpTrim {
		cut := r.Uint64N(sectors)
		o.Off += cut * sectorBytes
		o.Len = (1 + r.Uint64N(n*sectors-cut)) * sectorBytes
	}
	return o
}

// submit invokes an operation.
func (c *client) submit(v *volume.Op, reader bool) *op {
	w := c.w
	o := &op{Op: *v, c: c, reader: reader, at: w.now, inv: w.tick()}
	o.User = o
	c.live = append(c.live, o)
	switch o.Kind {
	case volume.OpRead:
		o.Data = make([]byte, o.Len)
	case volume.OpWrite:
		o.Data = make([]byte, o.Len)
		w.check.write(o)
	case volume.OpZero, volume.OpTrim:
		w.check.write(o)
	}
	w.note("client", "invoke", o.String, uint64(o.Kind), o.Off, o.Len)
	c.a.step(&volume.Submit{Ops: []*volume.Op{&o.Op}})
	return o
}

// done takes an answer.
func (c *client) done(d volume.Done) {
	if c.gone {
		return
	}
	o := d.Op.User.(*op)
	if o.over {
		c.w.violate("P1", "an operation is answered twice: %s", o)
		return
	}
	c.forget(o)
	o.over, o.status = true, d.Status
	c.w.note("client", "answer", func() string { return fmt.Sprintf("%s: %s", o, d.Status) }, uint64(d.Status), o.inv)
	c.w.check.answered(o, d.Status)
	if o.Kind == volume.OpWrite {
		for i := range o.Data { // the buffer is somebody else's now
			o.Data[i] = 0xee
		}
	}
	if !o.reader {
		c.next(false)
	}
	if o.then != nil {
		o.then(d.Status)
	}
}

func (c *client) forget(o *op) {
	for i, x := range c.live {
		if x == o {
			c.live[i] = c.live[len(c.live)-1]
			c.live = c.live[:len(c.live)-1]
			return
		}
	}
}

// abandon is the end of the gateway as its client sees it: no answers.
func (c *client) abandon() {
	if c.gone {
		return
	}
	c.gone = true
	c.w.stats.Unknown += len(c.live)
	c.live = nil
}

func (o *op) String() string {
	kind := [...]string{"read", "write", "zero", "trim", "flush"}[o.Kind]
	if o.States != nil {
		kind = "status"
	}
	if o.FUA {
		kind += "+fua"
	}
	out := fmt.Sprintf("#%d %s epoch %d", o.inv, kind, o.c.a.epoch)
	if o.Kind != volume.OpFlush {
		out += fmt.Sprintf(" block %d+%d sectors %d", o.Off/ids.BlockSize, o.Off%ids.BlockSize/sectorBytes, o.Len/sectorBytes)
	}
	if len(o.vals) > 0 {
		out += fmt.Sprintf(" values %d…", o.vals[0].id)
	}
	return out
}
