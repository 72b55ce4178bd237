package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Bounds of a probe.
const (
	probeEvery = 10 * time.Millisecond
	probePort  = 7100
	flowBytes  = 8
	lateAfter  = 2 * time.Second // what has not come back by then is lost
)

// Gaps is the longest silence that flows of a kind saw.
type Gaps struct {
	UDP, TCP time.Duration
}

// Probe is a set of flows between storage addresses, running.
type Probe struct {
	stop chan struct{}
	wg   sync.WaitGroup
	undo []io.Closer

	mu    sync.Mutex // guards the fields below
	gaps  Gaps
	flows []*flow
	errs  []error
	quiet bool // nothing more is sent
}

// flow is one connection's account.
type flow struct {
	network    string
	last       time.Time // when something came back last
	sent, back int
}

// Probe starts flows from one host to another: each sends a number every 10 ms
// and gets it back.
func (l *Lab) Probe(from, to, udp, tcp int) (p *Probe, err error) {
	p = &Probe{stop: make(chan struct{})}
	defer func() {
		if err != nil {
			_, cerr := p.Stop()
			err = errors.Join(err, cerr)
		}
	}()
	at := netip.AddrPortFrom(Stable(to), probePort)
	if err := l.In(fmt.Sprintf("host-%d", to), func() error { return p.serve(at) }); err != nil {
		return p, err
	}
	return p, l.In(fmt.Sprintf("host-%d", from), func() error {
		for i := range udp + tcp {
			network := "udp"
			if i >= udp {
				network = "tcp"
			}
			c, err := net.DialTimeout(network, at.String(), 2*time.Second)
			if err != nil {
				return err
			}
			p.undo = append(p.undo, c)
			f := &flow{network: network, last: time.Now()}
			p.mu.Lock()
			p.flows = append(p.flows, f)
			p.mu.Unlock()
			ended := make(chan struct{})
			p.wg.Go(func() { p.send(c, f, ended) })
			p.wg.Go(func() { defer close(ended); p.receive(c, f) })
		}
		return nil
	})
}

func (p *Probe) serve(at netip.AddrPort) error {
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	p.undo = append(p.undo, u)
	t, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	p.undo = append(p.undo, t)
	p.wg.Go(func() {
		b := make([]byte, flowBytes)
		for {
			n, who, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return // closed
			}
			if _, err := u.WriteToUDPAddrPort(b[:n], who); errors.Is(err, net.ErrClosed) {
				return
			} // another error is an unreachable peer, which the gap shows
		}
	})
	p.wg.Go(func() {
		for {
			c, err := t.Accept()
			if err != nil {
				return // closed
			}
			p.mu.Lock()
			p.undo = append(p.undo, c)
			p.mu.Unlock()
			p.wg.Go(func() {
				if _, err := io.Copy(c, c); err != nil {
					p.failed(err)
				}
			})
		}
	})
	return nil
}

func (p *Probe) send(c net.Conn, f *flow, ended <-chan struct{}) {
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for n := uint64(1); ; n++ {
		select {
		case <-p.stop:
			return
		case <-ended:
			return
		case <-t.C:
		}
		p.mu.Lock()
		quiet := p.quiet
		if !quiet {
			f.sent++
		}
		p.mu.Unlock()
		if quiet {
			continue
		}
		if _, err := c.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil && f.network == "tcp" {
			p.failed(err)
			return
		} // UDP: unreachable for now; the gap shows it
	}
}

func (p *Probe) receive(c net.Conn, f *flow) {
	b := make([]byte, flowBytes)
	for {
		var err error
		if f.network == "tcp" {
			_, err = io.ReadFull(c, b)
		} else {
			_, err = c.Read(b)
		}
		select {
		case <-p.stop:
			return
		default:
		}
		if err != nil {
			if f.network == "udp" && !errors.Is(err, net.ErrClosed) {
				continue // unreachable, told by the network
			}
			p.failed(err)
			return
		}
		p.mu.Lock()
		now := time.Now()
		p.silent(f, now)
		f.last = now
		f.back++
		p.mu.Unlock()
	}
}

// silent accounts for the time since a flow's last answer. The caller holds the
// lock.
func (p *Probe) silent(f *flow, now time.Time) {
	if f.network == "udp" {
		p.gaps.UDP = max(p.gaps.UDP, now.Sub(f.last))
	} else {
		p.gaps.TCP = max(p.gaps.TCP, now.Sub(f.last))
	}
}

func (p *Probe) failed(err error) {
	select {
	case <-p.stop:
		return
	default:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.errs = append(p.errs, err)
}

// Take returns the gaps since the last Take, those that go on included.
func (p *Probe) Take() Gaps {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.flows {
		p.silent(f, time.Now())
	}
	g := p.gaps
	p.gaps = Gaps{}
	return g
}

// Lost stops the flows' sending and returns how many numbers of UDP flows have
// not come back, after all had a moment to.
func (p *Probe) Lost() int {
	p.mu.Lock()
	p.quiet = true
	p.mu.Unlock()
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for late := time.Now().Add(lateAfter); ; <-t.C {
		lost := 0
		p.mu.Lock()
		for _, f := range p.flows {
			if f.network == "udp" {
				lost += f.sent - f.back
			}
		}
		p.mu.Unlock()
		if lost == 0 || time.Now().After(late) {
			return lost
		}
	}
}

// Stop ends the flows and returns what broke them before.
func (p *Probe) Stop() (Gaps, error) {
	close(p.stop)
	p.mu.Lock()
	undo := p.undo
	p.mu.Unlock()
	var errs []error
	for _, c := range undo {
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	p.wg.Wait()
	return p.Take(), errors.Join(append(errs, p.errs...)...)
}
