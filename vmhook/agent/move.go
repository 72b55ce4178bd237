package agent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/machine"
)

// A live migration, as far as one host's agent is concerned (the order, and who
// decides, is in placement/driver/migrate.go). The memory goes from QEMU to QEMU
// through both host processes, on the storage network; if either ends, so does the
// stream, and QEMU A keeps its guest.
//
//	A: Send, Finish, GoBack       B: Receive, Arrive, Land, Abandon

const (
	tokenBytes  = 32
	tokenWait   = 10 * time.Second // for the first bytes of a connection
	acceptWait  = time.Minute      // for the sender to connect
	abandonWait = 15 * time.Second
)

// Incoming is where a machine's memory is to be sent.
type Incoming struct {
	Addr  string
	Token []byte // goes before it: nobody else's bytes become a machine
}

// Features tells apart machines that cannot take over from each other: QEMU's
// version, what executes the guest, and with KVM the processor.
func (a *Agent) Features(ctx context.Context) (string, error) {
	program := a.cfg.QEMU
	if program == "" {
		program = "qemu-system-x86_64"
	}
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return "", status.Errorf(status.Unsupported, "QEMU's version cannot be told: %w", err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	f := strings.TrimSpace(line) + ", " + a.accelerator(ctx).Name
	if a.accelerator(ctx).Name != "kvm" {
		return f, nil
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", status.Errorf(status.IO, "this host's processor cannot be told: %w", err)
	}
	for line := range strings.Lines(string(info)) {
		if strings.HasPrefix(line, "model name") || strings.HasPrefix(line, "flags") {
			sum := sha256.Sum256([]byte(line))
			f += " " + hex.EncodeToString(sum[:4])
			if strings.HasPrefix(line, "flags") {
				break // the others are alike
			}
		}
	}
	return f, nil
}

// Definition returns a running machine as it was started, for its like elsewhere.
func (a *Agent) Definition(ctx context.Context, name string) (*pb.VM, error) {
	e, err := a.find(ctx, name)
	if err != nil {
		return nil, err
	}
	s := e.m.Spec()
	return &pb.VM{Name: s.Name, Cpus: uint32(s.CPUs), MemoryBytes: s.MemoryBytes, Disks: e.volumes, Kernel: s.Kernel, Initrd: s.Initrd, Append: s.Append}, nil
}

// Receive starts a machine that waits for its memory from another host. What is
// left of an earlier attempt is ended first.
func (a *Agent) Receive(ctx context.Context, v *pb.VM, from string, sizes []uint64) (in Incoming, err error) {
	if err := a.Abandon(ctx, v.Name); err != nil && !errors.Is(err, status.NotFound) {
		return in, err
	}
	e, err := a.reserve(v)
	if err != nil {
		return in, err
	}
	m, err := a.receive(ctx, v, e, from, sizes)
	if err != nil {
		a.drop(e, nil)
		a.wg.Done()
		return in, err
	}
	a.watch(e, m)
	in, err = a.open(ctx, e)
	if err != nil {
		err = errors.Join(err, a.Abandon(ctx, v.Name))
	}
	return in, err
}

func (a *Agent) receive(ctx context.Context, v *pb.VM, e *vm, from string, sizes []uint64) (*machine.Machine, error) {
	if len(sizes) != len(e.volumes) {
		return nil, status.Errorf(status.Invalid, "VM %s has %d disks and comes with the sizes of %d", e.name, len(e.volumes), len(sizes))
	}
	spec := a.spec(ctx, v)
	spec.Incoming = true
	for i, name := range e.volumes {
		uri := a.cfg.Volumes.Expect(name, from, sizes[i])
		spec.Disks = append(spec.Disks, machine.Disk{Name: name, URI: uri, Serial: serial(name)})
	}
	m, err := machine.Start(ctx, spec)
	if err != nil {
		return nil, errors.Join(err, a.detach(e.volumes))
	}
	return m, nil
}

// open lets the machine's memory in.
func (a *Agent) open(ctx context.Context, e *vm) (in Incoming, err error) {
	socket, err := e.m.Receive(ctx)
	if err != nil {
		return in, err
	}
	in.Token = make([]byte, tokenBytes)
	_, _ = rand.Read(in.Token) // never fails
	ls, addr, err := a.cfg.Listen()
	if err != nil {
		return in, err
	}
	in.Addr = addr
	a.background(func() {
		if err := a.take(e, ls, in.Token, socket); err != nil && a.ctx.Err() == nil {
			a.cfg.Log.Warn("the memory of a VM did not come", "vm", e.name, "err", err)
		}
	})
	return in, nil
}

// background runs f, counted in a.wg, unless the agent is closed.
func (a *Agent) background(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.wg.Add(1)
	go func() { defer a.wg.Done(); f() }()
}

// take waits for the sender, and carries what it sends to QEMU.
func (a *Agent) take(e *vm, ls []net.Listener, token []byte, socket string) error {
	ctx, cancel := context.WithTimeout(a.ctx, acceptWait)
	defer cancel()
	good := make(chan net.Conn)
	var wg sync.WaitGroup
	for _, l := range ls {
		wg.Go(func() { a.admit(ctx, l, token, good) })
	}
	var conn net.Conn
	select {
	case conn = <-good:
	case <-ctx.Done():
	case <-e.m.Done():
	}
	cancel()
	var errs []error
	for _, l := range ls {
		errs = append(errs, l.Close())
	}
	wg.Wait()
	if conn == nil {
		return errors.Join(append(errs, status.Errorf(status.Timeout, "nobody sent it"))...)
	}
	qemu, err := net.Dial("unix", socket)
	if err != nil {
		return errors.Join(append(errs, err, conn.Close())...)
	}
	return errors.Join(append(errs, a.carry(e, conn, qemu))...)
}

// admit gives the first connection that brings the token to good.
func (a *Agent) admit(ctx context.Context, l net.Listener, token []byte, good chan<- net.Conn) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed by take
		}
		got := make([]byte, len(token))
		err = c.SetReadDeadline(time.Now().Add(tokenWait))
		if err == nil {
			_, err = io.ReadFull(c, got)
		}
		if err == nil {
			err = c.SetReadDeadline(time.Time{})
		}
		if err == nil && subtle.ConstantTimeCompare(got, token) == 1 {
			select {
			case good <- c:
				return
			case <-ctx.Done():
			}
		}
		a.cfg.Log.Warn("a connection for a VM's memory is not the sender's, or came late", "from", c.RemoteAddr(), "err", errors.Join(err, c.Close()))
	}
}

// carry copies both ways until either end closes, the machine ends or the agent
// does. A stream that is cut is no error here: QEMU says what it means.
func (a *Agent) carry(e *vm, x, y net.Conn) error {
	done := make(chan struct{}, 2)
	for _, d := range [][2]net.Conn{{x, y}, {y, x}} {
		go func() {
			_, _ = io.Copy(d[0], d[1])
			done <- struct{}{}
		}()
	}
	left := 2
	select {
	case <-done:
		left--
	case <-e.m.Done():
	case <-a.ctx.Done():
	}
	err := errors.Join(x.Close(), y.Close())
	for range left {
		<-done
	}
	return err
}

// Send sends a running machine's memory, and returns when the guest stands still
// and all but the last is there. After an error GoBack has to be called.
func (a *Agent) Send(ctx context.Context, name string, to Incoming) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	socket := filepath.Join(a.cfg.Dir, name, "out.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return status.Errorf(status.IO, "VM %s: %w", name, err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return status.Errorf(status.IO, "VM %s: %w", name, err)
	}
	far, err := a.cfg.Dial(ctx, to.Addr)
	if err == nil {
		_, err = far.Write(to.Token)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("VM %s cannot be sent to %s: %w", name, to.Addr, err), l.Close())
	}
	a.background(func() {
		near, err := l.Accept()
		err = errors.Join(unlessClosed(err), unlessClosed(l.Close())) // also removes the socket
		if near == nil {
			err = errors.Join(err, far.Close())
		} else {
			err = errors.Join(err, a.carry(e, near, far))
		}
		if err != nil && a.ctx.Err() == nil {
			a.cfg.Log.Warn("the stream of a VM's memory", "vm", name, "err", err)
		}
	})
	err = e.m.Send(ctx, socket)
	if err != nil { // QEMU may never have connected
		err = errors.Join(err, unlessClosed(l.Close()))
	}
	return err
}

// unlessClosed leaves out that a listener was closed already, on purpose.
func unlessClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Finish sends what is left. On success this machine's guest does not run again,
// unless GoBack lets it.
func (a *Agent) Finish(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	return e.m.Finish(ctx)
}

// GoBack lets a machine run here again whose move was given up, with its volumes,
// whoever has them. What waited for its memory elsewhere must have been ended, or
// be sure never to run.
func (a *Agent) GoBack(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	e.attaching.Lock()
	defer e.attaching.Unlock()
	if e.detached {
		return status.Errorf(status.NotFound, "VM %s has ended", name)
	}
	for _, v := range e.volumes {
		if err := a.cfg.Volumes.TakeBack(ctx, v); err != nil {
			return fmt.Errorf("take volume %s back: %w", v, err)
		}
	}
	return e.m.GoBack(ctx)
}

// Arrive waits until all of a machine is here: memory and volumes. It does not run
// yet.
func (a *Agent) Arrive(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	attached := make(chan error, 1)
	go func() { attached <- a.reattach(ctx, e) }()
	return errors.Join(e.m.Arrived(ctx), <-attached)
}

// Land lets a machine run that has arrived: metadata must have said so. NotFound:
// there is none, or its memory has not come whole, so that it is lost.
func (a *Agent) Land(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if err := a.reattach(ctx, e); err != nil {
		return err
	}
	e.attaching.Lock()
	defer e.attaching.Unlock()
	if e.detached {
		return status.Errorf(status.NotFound, "VM %s has ended", name)
	}
	return e.m.Land(ctx)
}

// Abandon ends a machine that waits for its memory, or has it and was not told to
// run. NotFound: there is none. Any other machine of the name is left alone
// (status.Conflict).
func (a *Agent) Abandon(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if !e.m.Arriving() {
		return status.Errorf(status.Conflict, "VM %s is not waiting for its memory here", name)
	}
	if err := e.m.Stop(ctx, true); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, abandonWait)
	defer cancel()
	select {
	case <-e.gone:
		return e.err
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "VM %s is ended, and its volumes are not let go of yet", name)
	}
}

// Migration says how far a machine's way to another host is; and when its guest
// stopped for it.
func (a *Agent) Migration(ctx context.Context, name string) (machine.Migration, time.Time, error) {
	e, err := a.find(ctx, name)
	if err != nil {
		return machine.Migration{}, time.Time{}, err
	}
	g, err := e.m.Migration(ctx)
	return g, e.m.Stopped(), err
}
