package check

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Stages of an operation, in reading order:
//
//	1 worker.choose   the seed decides kind, place and length
//	2 worker.run      every register touched is entered in the history (Begin)
//	3 Device          the connection does it, many at a time
//	4 worker.settle   an answer ends the entries; a lost connection leaves them unknown

// ErrDisconnected is wrapped by a Device's error when the connection was lost
// and the outcome is unknown. Every other error is an answer of the server and
// fails the run.
var ErrDisconnected = errors.New("the connection was lost")

// Device is one connection to the disk under test. Its methods may be called
// from many goroutines at once; Close makes all calls in flight return. The
// slices stay the caller's once a call has returned.
type Device interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	WriteFUA(p []byte, off int64) error
	Trim(off, n int64) error
	WriteZeroes(off, n int64) error
	Flush() error
	Close() error
}

// Config describes a load. Zero fields get the defaults named.
type Config struct {
	Dial    func(ctx context.Context) (Device, error)
	Seed    uint64
	Base    int64         // where the area under test begins on the device, in bytes (0)
	Blocks  uint64        // size of the area in blocks (4096)
	Conns   int           // connections (2)
	Depth   int           // operations in flight on each (16)
	Rate    int           // operations a second over all, so that the checker keeps up (4000)
	Ops     int           // stop after so many operations; 0: when the context ends
	Patient time.Duration // an operation, or a reconnect, that takes longer fails the run (60 s)
	History *History      // goes on with this one; nil: a new one
	// FirstClient numbers the clients, Conns × Depth of them, from here on: loads
	// that share a history, and so a seed, must not share clients.
	FirstClient int
	// Tolerate says which error answers do not fail the run: what was asked for
	// then counts as unknown. nil: none.
	Tolerate func(error) bool
	Log      func(format string, args ...any)
}

// LoadStats is what a load did and how long it waited.
type LoadStats struct {
	Kinds      []KindStats
	Reconnects int // connections that were lost
	// LongestOutageNs is the longest time from the loss of a connection to the
	// next answer on its successor.
	LongestOutageNs int64
}

// KindStats is one kind of operation's part. LongestAtNs is when the longest
// operation began, in the history's time.
type KindStats struct {
	Kind        string
	Count       int // answered
	Unknown     int // cut off by a lost connection
	Refused     int // answered with an error
	LongestNs   int64
	LongestAtNs int64
}

// Load makes verified random I/O. One Load may run several times, around
// crashes and from several devices; values stay unique over all of them. Run
// and ReadAll are not to be called at the same time.
type Load struct {
	cfg     Config
	history *History
	workers []*worker
	done    atomic.Int64 // operations begun, against cfg.Ops

	mu     sync.Mutex
	stats  [actionCount]KindStats // guarded by mu
	lost   int                    // guarded by mu: connections lost
	outage int64                  // guarded by mu: LoadStats.LongestOutageNs
	failed error                  // guarded by mu: the first failure of a run
}

// NewLoad prepares a load; nothing is dialled yet.
func NewLoad(cfg Config) *Load {
	fallback := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	fallback(&cfg.Conns, 2)
	fallback(&cfg.Depth, 16)
	fallback(&cfg.Rate, 4000)
	if cfg.Blocks == 0 {
		cfg.Blocks = 4096
	}
	if cfg.Patient == 0 {
		cfg.Patient = time.Minute
	}
	if cfg.History == nil {
		cfg.History = NewHistory()
	}
	if cfg.Log == nil {
		cfg.Log = func(string, ...any) {}
	}
	l := &Load{cfg: cfg, history: cfg.History}
	for i := range cfg.Conns * cfg.Depth {
		l.workers = append(l.workers, &worker{load: l, id: cfg.FirstClient + i,
			rng: rand.New(rand.NewPCG(cfg.Seed, uint64(cfg.FirstClient+i))), buf: make([]byte, maxBlocks*BlockBytes)})
	}
	for a := range l.stats {
		l.stats[a].Kind = action(a).String()
	}
	return l
}

// History is what was recorded so far.
func (l *Load) History() *History { return l.history }

// SetDial makes later runs use another way to the disk, as after an attach to
// another host.
func (l *Load) SetDial(dial func(ctx context.Context) (Device, error)) { l.cfg.Dial = dial }

// Stats is the account of all runs so far.
func (l *Load) Stats() LoadStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return LoadStats{Kinds: append([]KindStats(nil), l.stats[:]...), Reconnects: l.lost, LongestOutageNs: l.outage}
}

// Waiting is how many clients wait for an answer now.
func (l *Load) Waiting() int {
	n := 0
	for _, w := range l.workers {
		if w.busySince.Load() != 0 {
			n++
		}
	}
	return n
}

// Run makes I/O until ctx ends or Config.Ops are done, and returns the first
// failure: an error answer, torn content, or patience lost. Operations in
// flight at the end are waited for.
func (l *Load) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.done.Store(0)
	l.clearFailure()
	conns := make([]*conn, l.cfg.Conns)
	for i := range conns {
		conns[i] = &conn{load: l}
	}
	var wg sync.WaitGroup
	for i, w := range l.workers {
		wg.Go(func() {
			if err := w.loop(ctx, conns[i%len(conns)]); err != nil {
				l.fail(err)
				cancel()
			}
		})
	}
	unwatch := l.watch(conns)
	wg.Wait()
	unwatch()
	for _, c := range conns {
		if err := c.close(); err != nil {
			l.fail(err)
		}
	}
	return l.failure()
}

// AfterPowerLoss begins a new history in which every register first holds
// what was read of it: from then on it must be stable. Durable judges the old
// history against held.
func (l *Load) AfterPowerLoss(held map[uint64]Value) {
	l.history = NewHistory()
	for register, v := range held {
		l.history.Add(Op{Client: l.cfg.FirstClient + len(l.workers), Kind: Write, Block: register, Value: v, Durable: true})
	}
}

func (l *Load) clearFailure() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = nil
}

func (l *Load) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

func (l *Load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == nil {
		l.failed = err
	}
}

// watchEvery is how often waiting operations are looked at.
const watchEvery = 250 * time.Millisecond

// watch frees workers whose operation outlasts the patience: closing the
// connection makes their calls return. The function returned ends it.
func (l *Load) watch(conns []*conn) (end func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				l.freeStuck(conns)
			}
		}
	}()
	return func() { close(stop); <-stopped }
}

func (l *Load) freeStuck(conns []*conn) {
	for i, w := range l.workers {
		since := w.busySince.Load()
		if since == 0 || time.Since(time.Unix(0, since)) < l.cfg.Patient {
			continue
		}
		l.fail(fmt.Errorf("an operation of client %d got no answer in %v", w.id, l.cfg.Patient))
		if err := conns[i%len(conns)].close(); err != nil {
			l.fail(err)
		}
	}
}

// ReadAll reads every block of the area once into the history and returns
// what each register held; a tolerated error leaves the 16 blocks of its
// request out. It fails as Run does; a lost connection is reconnected and the
// read repeated.
func (l *Load) ReadAll(ctx context.Context) (map[uint64]Value, error) {
	l.clearFailure()
	c := &conn{load: l}
	unwatch := l.watch([]*conn{c})
	held := map[uint64]Value{}
	for at := uint64(0); at < l.cfg.Blocks; at += maxBlocks {
		if err := l.readBlocks(ctx, c, at, held); err != nil {
			l.fail(err) // unless the watch knew why first
			break
		}
	}
	unwatch()
	if err := c.close(); err != nil {
		l.fail(err)
	}
	return held, l.failure()
}

func (l *Load) readBlocks(ctx context.Context, c *conn, at uint64, held map[uint64]Value) error {
	w := l.workers[0]
	r := request{action: read, off: int64(at) * BlockBytes, n: int(min(maxBlocks, l.cfg.Blocks-at)) * BlockBytes}
	spans, err := w.do(ctx, c, r)
	for errors.Is(err, ErrDisconnected) && ctx.Err() == nil {
		spans, err = w.do(ctx, c, r)
	}
	if errors.Is(err, errTolerated) {
		return nil
	}
	for _, s := range spans {
		held[s.register] = identify(w.buf[s.off-r.off:][:s.n], l.cfg.Seed, s.register)
	}
	return err
}

// redialEvery is the pause between attempts to reach the disk again.
const redialEvery = 20 * time.Millisecond

// conn is one connection, shared by Depth workers, dialled when first needed
// and again when lost.
type conn struct {
	load *Load

	mu     sync.Mutex
	dev    Device // guarded by mu; nil: not connected
	closed bool   // guarded by mu

	lostAt atomic.Int64 // unix ns of a loss not yet made good by an answer, 0 = none
}

// get returns the live device, dialling until patience or ctx ends.
func (c *conn) get(ctx context.Context) (Device, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, context.Canceled
	}
	if c.dev != nil {
		return c.dev, nil
	}
	limit, cancel := context.WithTimeout(ctx, c.load.cfg.Patient)
	defer cancel()
	for {
		dev, err := c.load.cfg.Dial(limit)
		if err == nil {
			c.dev = dev
			return dev, nil
		}
		select {
		case <-limit.Done():
			if ctx.Err() != nil { // the run's end, not its patience's
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("the disk could not be reached again in %v: %w", c.load.cfg.Patient, err)
		case <-time.After(redialEvery):
		}
	}
}

// drop gives up dev if it is still the live one.
func (c *conn) drop(dev Device, why error) {
	c.mu.Lock()
	if c.dev != dev || c.closed {
		c.mu.Unlock()
		return
	}
	c.dev = nil
	c.mu.Unlock()
	c.lostAt.CompareAndSwap(0, time.Now().UnixNano())
	// Whatever closing a broken connection says adds nothing to why.
	if err := dev.Close(); err != nil {
		why = errors.Join(why, err)
	}
	c.load.mu.Lock()
	c.load.lost++
	c.load.mu.Unlock()
	c.load.cfg.Log("load: connection lost (%v), reconnecting", why)
}

// answered ends an outage.
func (c *conn) answered() {
	at := c.lostAt.Swap(0)
	if at == 0 {
		return
	}
	took := time.Since(time.Unix(0, at)).Nanoseconds()
	c.load.mu.Lock()
	defer c.load.mu.Unlock()
	c.load.outage = max(c.load.outage, took)
}

func (c *conn) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.dev == nil {
		return nil
	}
	dev := c.dev
	c.dev = nil
	if err := dev.Close(); err != nil && !errors.Is(err, ErrDisconnected) {
		return fmt.Errorf("the disk's connection does not close: %w", err)
	}
	return nil
}
