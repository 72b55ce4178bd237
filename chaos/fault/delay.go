package fault

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// delayBuffer bounds what is on the way in one direction: beyond it the sender
// waits, as with a full pipe. Parts of at most partBytes.
const (
	delayBuffer = 1024
	partBytes   = 64 << 10
)

// Delay passes TCP connections on to an address and holds every byte back for a
// time, in each direction: a longer wire, without root. Order is kept.
type Delay struct {
	l     net.Listener
	to    string
	delay time.Duration

	wg    sync.WaitGroup
	mu    sync.Mutex // guards the fields below
	conns map[net.Conn]bool
	ended bool
}

// NewDelay listens on loopback; Close ends it.
func NewDelay(to string, delay time.Duration) (*Delay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("no port for a delay of %s: %w", to, err)
	}
	d := &Delay{l: l, to: to, delay: delay, conns: map[net.Conn]bool{}}
	d.wg.Go(d.serve)
	return d, nil
}

// Addr is where to connect instead.
func (d *Delay) Addr() string { return d.l.Addr().String() }

// Close cuts every connection and returns when nothing of it runs.
func (d *Delay) Close() error {
	d.mu.Lock()
	d.ended = true
	err := d.l.Close()
	for c := range d.conns {
		_ = c.Close() // it is being cut: what it has to say is not asked
	}
	d.mu.Unlock()
	d.wg.Wait()
	return err
}

func (d *Delay) serve() {
	for {
		in, err := d.l.Accept()
		if err != nil {
			return // closed
		}
		out, err := net.Dial("tcp", d.to)
		if err != nil {
			_ = in.Close() // the peer sees a cut: the target is away
			continue
		}
		if !d.keep(in, out) {
			return
		}
		d.wg.Go(func() { d.pass(in, out) })
		d.wg.Go(func() { d.pass(out, in) })
	}
}

// keep notes a pair to be cut by Close; false when that has begun.
func (d *Delay) keep(in, out net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		_, _ = in.Close(), out.Close()
		return false
	}
	d.conns[in], d.conns[out] = true, true
	return true
}

// part is bytes on the way.
type part struct {
	due time.Time
	b   []byte
}

// pass carries one direction until either end closes, then cuts both.
func (d *Delay) pass(from, to net.Conn) {
	parts := make(chan part, delayBuffer)
	d.wg.Go(func() {
		defer close(parts)
		for {
			b := make([]byte, partBytes)
			n, err := from.Read(b)
			if n > 0 {
				parts <- part{time.Now().Add(d.delay), b[:n]}
			}
			if err != nil {
				return
			}
		}
	})
	var err error
	for p := range parts { // to its end, so that the reader never hangs
		if err != nil {
			continue
		}
		if wait := time.Until(p.due); wait > 0 {
			time.Sleep(wait)
		}
		if _, err = to.Write(p.b); err != nil && !errors.Is(err, io.EOF) {
			_ = from.Close() // nobody is left to read: the sender must stop
		}
	}
	_, _ = from.Close(), to.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, from)
	delete(d.conns, to)
}
