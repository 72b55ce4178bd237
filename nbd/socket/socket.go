// Package socket is a stream connection whose senders never block: frames of
// many goroutines are combined into few writes.
//
// Duty: an outbox per connection, written at once by whoever filled it, and by
// a goroutine of its own only while the peer does not take the bytes.
// Floor: F1. It knows no protocol, does not read, and does not bound the
// outbox: its users bound what they have in flight.
package socket

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Owner is told when a frame's bytes are no longer needed: they were handed to
// the kernel, or the connection failed. It is called once per frame, with no
// lock of this package held, and must not block.
type Owner interface{ Sent() }

// Outbox gathers frames for one connection and writes them in order.
//
// Whoever unlocks it writes what is there without waiting, so the usual frame
// costs no hand-off to another goroutine. If the kernel's buffer is full, or
// the connection is not a bare socket (TLS), a goroutine takes over until the
// outbox is empty: the caller may be an engine that serves others.
type Outbox struct {
	nc     net.Conn
	raw    syscall.RawConn // nil: not a bare socket
	failed func(error)     // called once, at the first failure of a write
	tryFn  func(fd uintptr) bool
	waitFn func(fd uintptr) bool

	mu      sync.Mutex // guards what follows
	queue   batch      // frames not taken by the writer
	writing bool       // somebody is the writer, and owns now, iov and werr
	err     error      // the connection has failed: frames are dropped
	idle    chan struct{}

	now  batch
	iov  []unix.Iovec
	werr error
	flat []byte // TLS only: frames gathered into records
}

// batch is a run of frames. bufs are non-empty and in order.
type batch struct {
	bufs   [][]byte
	owners []Owner
}

func (b *batch) reset() {
	clear(b.bufs)
	clear(b.owners)
	b.bufs, b.owners = b.bufs[:0], b.owners[:0]
}

const (
	maxVectors = 512      // of one writev; the kernel takes 1024
	maxRounds  = 4        // writes one caller makes for others before a goroutine takes over
	maxFlat    = 64 << 10 // bytes gathered for one TLS write
)

// NewOutbox returns an outbox for nc. failed may be called from any goroutine
// that uses the outbox, with no lock held.
func NewOutbox(nc net.Conn, failed func(error)) (*Outbox, error) {
	o := &Outbox{nc: nc, failed: failed}
	o.tryFn = func(fd uintptr) bool { o.writev(fd); return true }
	o.waitFn = func(fd uintptr) bool { return o.writev(fd) }
	switch c := nc.(type) {
	case *net.TCPConn, *net.UnixConn:
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			return nil, fmt.Errorf("reach the socket: %w", err)
		}
		o.raw = raw
	}
	return o, nil
}

// Lock begins a run of Add calls.
func (o *Outbox) Lock() { o.mu.Lock() }

// Add queues a frame: head, then data, either of which may be empty. Neither
// may change until owner (nil: nobody) is told. The outbox is locked.
func (o *Outbox) Add(head, data []byte, owner Owner) {
	if len(head) > 0 {
		o.queue.bufs = append(o.queue.bufs, head)
	}
	if len(data) > 0 {
		o.queue.bufs = append(o.queue.bufs, data)
	}
	if owner != nil {
		o.queue.owners = append(o.queue.owners, owner)
	}
}

// Unlock ends a run of Add calls and writes what the kernel takes at once.
func (o *Outbox) Unlock() {
	if o.writing || (len(o.queue.bufs) == 0 && len(o.queue.owners) == 0) {
		o.mu.Unlock()
		return
	}
	o.writing = true
	o.mu.Unlock()
	for round := 0; o.take(); round++ {
		if o.raw == nil || round == maxRounds || !o.try() {
			go o.drain()
			return
		}
		o.told()
	}
}

// take makes the queue the writer's; false means that there is none and that
// nobody is the writer any more.
func (o *Outbox) take() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queue.bufs) == 0 && len(o.queue.owners) == 0 {
		o.writing = false
		if o.idle != nil {
			close(o.idle)
			o.idle = nil
		}
		return false
	}
	o.now, o.queue = o.queue, o.now
	if o.err != nil {
		o.now.bufs = o.now.bufs[:0]
	}
	return true
}

// told tells the owners of a batch that is done with.
func (o *Outbox) told() {
	for _, w := range o.now.owners {
		w.Sent()
	}
	o.now.reset()
}

// try writes the batch as far as it goes without waiting; true means that it
// is through, or that the connection failed.
func (o *Outbox) try() bool {
	if len(o.now.bufs) == 0 {
		return true
	}
	if err := o.raw.Write(o.tryFn); err != nil {
		o.fail(err)
	} else if o.werr != nil {
		o.fail(o.werr)
	}
	return len(o.now.bufs) == 0
}

// drain writes, and waits, until the outbox is empty. It begins with a batch
// already taken.
func (o *Outbox) drain() {
	for {
		var err error
		switch {
		case len(o.now.bufs) == 0:
		case o.raw == nil:
			err = o.writeFlat()
		default:
			if err = o.raw.Write(o.waitFn); err == nil {
				err = o.werr
			}
		}
		if err != nil {
			o.fail(err)
		}
		o.told()
		if !o.take() {
			return
		}
	}
}

// writev hands the batch to the kernel. True: it is through, or has failed
// (werr); false: the kernel takes no more now, the rest stays in the batch.
func (o *Outbox) writev(fd uintptr) bool {
	for len(o.now.bufs) > 0 {
		o.iov = o.iov[:0]
		for _, b := range o.now.bufs[:min(len(o.now.bufs), maxVectors)] {
			v := unix.Iovec{Base: unsafe.SliceData(b)}
			v.SetLen(len(b))
			o.iov = append(o.iov, v)
		}
		n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(o.iov))), uintptr(len(o.iov)))
		clear(o.iov)
		switch errno {
		case 0:
			o.consume(int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			o.werr = os.NewSyscallError("writev", errno)
			return true
		}
	}
	return true
}

// consume takes n written bytes off the batch. The front of the array is kept
// for the next batch by moving the rest down only when a buffer is cut.
func (o *Outbox) consume(n int) {
	b := o.now.bufs
	i := 0
	for i < len(b) && n >= len(b[i]) {
		n -= len(b[i])
		i++
	}
	if i < len(b) {
		b[i] = b[i][n:]
	}
	k := copy(b, b[i:])
	clear(b[k:])
	o.now.bufs = b[:k]
}

// writeFlat writes the batch through a connection that takes one buffer at a
// time, small frames gathered.
func (o *Outbox) writeFlat() error {
	for _, b := range o.now.bufs {
		if len(o.flat)+len(b) > maxFlat {
			if err := o.flush(); err != nil {
				return err
			}
		}
		if len(b) >= maxFlat/2 {
			if err := o.flush(); err != nil {
				return err
			}
			if _, err := o.nc.Write(b); err != nil {
				return err
			}
			continue
		}
		o.flat = append(o.flat, b...)
	}
	return o.flush()
}

func (o *Outbox) flush() error {
	if len(o.flat) == 0 {
		return nil
	}
	_, err := o.nc.Write(o.flat)
	o.flat = o.flat[:0]
	return err
}

// fail drops the batch and everything that comes later, and reports the first
// failure.
func (o *Outbox) fail(err error) {
	o.now.bufs, o.werr, o.flat = o.now.bufs[:0], nil, o.flat[:0]
	o.mu.Lock()
	first := o.err == nil
	if first {
		o.err = err
	}
	o.mu.Unlock()
	if first && o.failed != nil {
		o.failed(err)
	}
}

// ErrSlow is why Finish gave up.
var ErrSlow = errors.New("the peer did not take what was sent in time")

// Finish waits until everything added so far was written, at most for patience.
func (o *Outbox) Finish(patience time.Duration) error {
	o.mu.Lock()
	if !o.writing {
		err := o.err
		o.mu.Unlock()
		return err
	}
	if o.idle == nil {
		o.idle = make(chan struct{})
	}
	idle := o.idle
	o.mu.Unlock()
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-idle:
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.err
	case <-t.C:
		return ErrSlow
	}
}
