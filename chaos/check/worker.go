package check

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// maxBlocks is the longest request: 16 blocks, 64 KiB.
const maxBlocks = 16

// splitEvery makes every eighth block a row of eight registers, one for each
// part, which are written by themselves: a partial write that brings back an
// older neighbour is a lost write there.
const splitEvery = 8

// hotBlocks get hotShare percent of all operations, so that requests overlap.
const (
	hotBlocks = 64
	hotShare  = 30
)

type action uint8

const (
	read action = iota
	write
	writeFUA
	trim
	writeZeroes
	flush
	actionCount
)

func (a action) String() string {
	return [actionCount]string{"read", "write", "write FUA", "trim", "write zeroes", "flush"}[a]
}

// shares are percentages and add up to 100.
var shares = [actionCount]int{read: 44, write: 44, writeFUA: 3, trim: 3, writeZeroes: 3, flush: 3}

// request is one device call; bytes [off, off+n) of the area begin and end at
// registers.
type request struct {
	action action
	off    int64
	n      int
}

// worker has one operation in flight at a time. It is one client of the
// history.
type worker struct {
	load *Load
	id   int
	rng  *rand.Rand
	seq  uint64 // values used so far
	buf  []byte // maxBlocks blocks

	busySince atomic.Int64 // unix ns of the device call in flight, 0 = none
}

// loop paces and makes operations until ctx ends, the count is reached or an
// answer is an error.
func (w *worker) loop(ctx context.Context, c *conn) error {
	l := w.load
	interval := time.Duration(len(l.workers)) * time.Second / time.Duration(l.cfg.Rate)
	next := time.Now().Add(time.Duration(w.rng.Int64N(int64(interval) + 1)))
	for {
		if l.cfg.Ops > 0 && l.done.Add(1) > int64(l.cfg.Ops) {
			return nil
		}
		if !sleepUntil(ctx, next) {
			return nil
		}
		// A stall is not made up for by a burst.
		next = maxTime(next.Add(interval), time.Now())
		_, err := w.do(ctx, c, w.choose())
		switch {
		case err == nil || errors.Is(err, ErrDisconnected) || errors.Is(err, errTolerated):
		case ctx.Err() != nil && errors.Is(err, ctx.Err()):
			return nil
		default:
			return err
		}
	}
}

// choose decides the next request from the seed.
func (w *worker) choose() request {
	blocks := w.load.cfg.Blocks
	r := request{action: w.pickAction()}
	if r.action == flush {
		return r
	}
	area := blocks
	if w.rng.IntN(100) < hotShare {
		area = min(blocks, hotBlocks)
	}
	at := w.rng.Uint64N(area)
	if isSplit(at) && r.action != trim && w.rng.IntN(4) != 0 {
		from := w.rng.IntN(partsPerBlock)
		to := from + 1 + w.rng.IntN(partsPerBlock-from)
		r.off = int64(at)*BlockBytes + int64(partBounds[from])
		r.n = partBounds[to] - partBounds[from]
		return r
	}
	n := uint64(1)
	if w.rng.IntN(100) < 25 {
		n = 1 + w.rng.Uint64N(maxBlocks)
	}
	r.off, r.n = int64(at)*BlockBytes, int(min(n, blocks-at))*BlockBytes
	return r
}

func (w *worker) pickAction() action {
	at := w.rng.IntN(100)
	for a, share := range shares {
		if at < share {
			return action(a)
		}
		at -= share
	}
	return read
}

func isSplit(block uint64) bool { return block%splitEvery == splitEvery-1 }

// spansOf lists the registers of r in order.
func spansOf(r request) []span {
	var out []span
	for at, end := r.off, r.off+int64(r.n); at < end; {
		block := uint64(at / BlockBytes)
		if !isSplit(block) {
			out = append(out, span{register: block, off: at, n: BlockBytes})
			at += BlockBytes
			continue
		}
		for p := range partsPerBlock {
			if s := partSpan(block, p); s.off >= at && s.off < end {
				out = append(out, s)
			}
		}
		at = int64(block+1) * BlockBytes
	}
	return out
}

// do runs one request and enters it in the history. ErrDisconnected means the
// outcome is unknown and recorded so.
func (w *worker) do(ctx context.Context, c *conn, r request) ([]span, error) {
	dev, err := c.get(ctx)
	if err != nil {
		return nil, err
	}
	spans := spansOf(r)
	values := w.prepare(r, spans)
	tokens := w.enter(r, spans, values)
	start := time.Now()
	w.busySince.Store(start.UnixNano())
	err = w.call(dev, r)
	w.busySince.Store(0)
	if err != nil {
		return nil, w.broken(c, dev, r, start, err)
	}
	c.answered()
	if err := w.settle(r, spans, values, tokens); err != nil {
		return nil, err
	}
	w.load.count(r.action, start, w.load.history.start, nil)
	return spans, nil
}

// prepare gives each register a new value and fills the buffer.
func (w *worker) prepare(r request, spans []span) []Value {
	values := make([]Value, len(spans))
	if r.action != write && r.action != writeFUA {
		return values
	}
	for i, s := range spans {
		w.seq++
		values[i] = Value(uint64(w.id)<<ValueClientShift | w.seq)
		fill(w.buf[s.off-r.off:][:s.n], w.load.cfg.Seed, s.register, values[i])
	}
	return values
}

func (w *worker) enter(r request, spans []span, values []Value) []int {
	if r.action == flush {
		return []int{w.load.history.begin(Op{Client: w.id, Kind: Flush})}
	}
	kind := Write
	if r.action == read {
		kind = Read
	}
	tokens := make([]int, len(spans))
	for i, s := range spans {
		tokens[i] = w.load.history.begin(Op{Client: w.id, Kind: kind, Block: s.register, Value: values[i], Durable: r.action == writeFUA})
	}
	return tokens
}

func (w *worker) call(dev Device, r request) error {
	p, at := w.buf[:r.n], w.load.cfg.Base+r.off
	var n int
	var err error
	switch r.action {
	case read:
		n, err = dev.ReadAt(p, at)
	case write:
		n, err = dev.WriteAt(p, at)
	case writeFUA:
		n, err = r.n, dev.WriteFUA(p, at)
	case trim:
		n, err = r.n, dev.Trim(at, int64(r.n))
	case writeZeroes:
		n, err = r.n, dev.WriteZeroes(at, int64(r.n))
	default:
		n, err = r.n, dev.Flush()
	}
	if err == nil && n != r.n {
		return fmt.Errorf("%d of %d bytes done without an error", n, r.n)
	}
	return err
}

// settle ends the history's entries and judges what a read brought.
func (w *worker) settle(r request, spans []span, values []Value, tokens []int) error {
	seed := w.load.cfg.Seed
	if r.action == read {
		for i, s := range spans {
			values[i] = identify(w.buf[s.off-r.off:][:s.n], seed, s.register)
		}
	}
	w.load.history.endAll(tokens, values)
	for i, v := range values {
		if v == Torn {
			s := spans[i]
			return fmt.Errorf("a read brought %s", explainTorn(w.buf[s.off-r.off:][:s.n], seed, s.register))
		}
	}
	return nil
}

// errTolerated stands for an error answer that Config.Tolerate accepts.
var errTolerated = errors.New("answered with a tolerated error")

// broken tells a lost connection, which is survived, from an error answer.
func (w *worker) broken(c *conn, dev Device, r request, start time.Time, err error) error {
	w.load.count(r.action, start, w.load.history.start, err)
	if errors.Is(err, ErrDisconnected) {
		c.drop(dev, err)
		return err
	}
	if t := w.load.cfg.Tolerate; t != nil && t(err) {
		return errTolerated
	}
	return fmt.Errorf("%s of %d bytes at %d was answered with an error: %w", r.action, r.n, w.load.cfg.Base+r.off, err)
}

func (l *Load) count(a action, start, epoch time.Time, err error) {
	took := time.Since(start).Nanoseconds()
	l.mu.Lock()
	defer l.mu.Unlock()
	k := &l.stats[a]
	switch {
	case errors.Is(err, ErrDisconnected):
		k.Unknown++
		return
	case err != nil:
		k.Refused++
		return
	}
	k.Count++
	if took > k.LongestNs {
		k.LongestNs, k.LongestAtNs = took, start.Sub(epoch).Nanoseconds()
	}
}

func sleepUntil(ctx context.Context, t time.Time) bool {
	wait := time.Until(t)
	if wait <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
