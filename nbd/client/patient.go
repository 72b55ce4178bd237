package client

import (
	"context"
	"crypto/tls"
	"sync"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/proto/status"
)

// Patient is a client of an export that outlives its server: when the
// connection is lost it dials again, and sends again what was not answered.
// That is safe for whoever does not rely on the order of overlapping requests
// in flight: NBD's commands have the same effect twice, and a cairn server
// discards what it had not read of the connection before.
//
// All methods of Client that wait are there, and Start.
type Patient struct {
	calls
	uri  string
	tls  *tls.Config
	wait time.Duration
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex // guards what follows
	c       *Client    // nil while there is no connection
	waiting []*attempt // to be sent over the next one; bounded by what the caller has in flight
	lost    uint64     // connections lost so far
	export  nbd.Export // as the last connection was told
	over    error      // nothing is sent any more
}

// attempt is a request with its owner's callback put aside.
type attempt struct {
	r    *Req
	done func(*Req)
	p    *Patient
}

// redialEvery is how often a server that is away is tried.
const redialEvery = 20 * time.Millisecond

// DialPatient opens an export, and keeps it open. wait bounds how long requests
// wait for a server that is away before they fail with status.Unavailable.
func DialPatient(ctx context.Context, uri string, tlsConf *tls.Config, wait time.Duration) (*Patient, error) {
	c, err := Dial(ctx, uri, tlsConf)
	if err != nil {
		return nil, err
	}
	p := &Patient{uri: uri, tls: tlsConf, wait: wait, c: c, export: c.Info()}
	p.calls = calls{p}
	p.ctx, p.stop = context.WithCancel(context.Background())
	return p, nil
}

// Info returns what the server said of the export when it was last opened.
func (p *Patient) Info() nbd.Export {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.export
}

// Size returns the export's size in bytes when it was last opened.
func (p *Patient) Size() uint64 { return p.Info().Size }

// MaxBytes is how much data one request may carry.
func (p *Patient) MaxBytes() uint32 {
	if m := p.Info().MaxBlock; m != 0 && m < nbd.MaxPayload {
		return m
	}
	return nbd.MaxPayload
}

// Lost returns how often the connection was lost.
func (p *Patient) Lost() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

// Start sends a request without waiting; Done is called once, with the answer
// of whichever connection brought one.
func (p *Patient) Start(r *Req) {
	a := &attempt{r: r, done: r.Done, p: p}
	r.Done = a.ended
	p.send(a)
}

// send starts an attempt on the connection there is, or lets it wait for one.
func (p *Patient) send(a *attempt) {
	p.mu.Lock()
	c, over := p.c, p.over
	if over == nil && c == nil {
		p.waiting = append(p.waiting, a)
	}
	p.mu.Unlock()
	switch {
	case over != nil:
		a.r.Err = over
		a.r.Done = a.done
		a.done(a.r)
	case c != nil:
		c.Start(a.r)
	}
}

// ended takes an attempt's end: an answer goes to the owner, the loss of the
// connection is nobody's business yet.
func (a *attempt) ended(r *Req) {
	switch status.Of(r.Err) {
	case status.Unknown, status.Unavailable, status.Shutdown:
		a.p.connectionLost(r.c, a)
	default:
		r.Done = a.done
		a.done(r)
	}
}

// connectionLost keeps a for the next connection and sees to it that there is
// one. It is called from a goroutine of c's and does not wait.
func (p *Patient) connectionLost(c *Client, a *attempt) {
	p.mu.Lock()
	if p.c == c && c != nil {
		p.c = nil
		p.lost++
		p.wg.Add(1)
		go p.redial(c)
	}
	p.mu.Unlock()
	p.send(a)
}

// redial opens the export again and sends what waits, or gives up.
func (p *Patient) redial(old *Client) {
	defer p.wg.Done()
	err := old.Close()
	ctx, cancel := context.WithTimeout(p.ctx, p.wait)
	defer cancel()
	var c *Client
	for {
		var derr error
		if c, derr = Dial(ctx, p.uri, p.tls); derr == nil {
			break
		}
		err = derr
		select {
		case <-time.After(redialEvery):
			continue
		case <-ctx.Done():
		}
		break
	}
	p.mu.Lock()
	if c == nil {
		p.over = status.Errorf(status.Unavailable, "the NBD server has been away for %v: %w", p.wait, err)
	} else {
		p.c, p.export = c, c.Info()
	}
	waiting := p.waiting
	p.waiting = nil
	p.mu.Unlock()
	for _, a := range waiting {
		p.send(a)
	}
}

// Close says goodbye; requests in flight are answered first, or fail.
func (p *Patient) Close() error {
	p.mu.Lock()
	p.over = status.Errorf(status.Unavailable, "the client is closed")
	c := p.c
	p.mu.Unlock()
	p.stop()
	p.wg.Wait()
	p.mu.Lock()
	if c == nil {
		c = p.c // that came meanwhile
	}
	p.mu.Unlock()
	if c == nil {
		return nil
	}
	return c.Close()
}
