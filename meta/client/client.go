// Package client asks the metadata service: it finds the leader, keeps the
// connections, and asks again until a command's outcome is known.
//
// Duty: commands with idempotency keys over a small pool of sessions, reads,
// lease renewals, and what each node says of itself. Floor: F3. It caches no
// answers and decides nothing about volumes.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Bounds and times.
const (
	maxSessions = 8                       // commands in flight per client
	maxConns    = 32                      // configured addresses and hinted ones
	tryTimeout  = 1500 * time.Millisecond // of one question to one node; then another is asked
	waitTimeout = 3 * time.Second         // the same, of an attach or detach: these wait for leases
	roundPause  = 50 * time.Millisecond   // after every node was asked in vain
	nodeTimeout = time.Second             // of Nodes
	maxReply    = 64 << 20
)

// Config configures a client.
type Config struct {
	Addrs []string    // API addresses of the metadata nodes, in any order
	TLS   *tls.Config // nil: plain
	Who   string      // for the event log: user or host
	// GiveUp is after how long without any leader a question fails with
	// Unavailable, naming who is missing; 0: it is asked until its context ends.
	GiveUp time.Duration
}

// Client is safe for concurrent use. It holds no goroutine of its own.
type Client struct {
	cfg   Config
	slots chan struct{} // one per command in flight; cap maxSessions

	mu     sync.Mutex // guards all below
	conns  map[string]*grpc.ClientConn
	order  []string // asked in this order, after the leader; the configured ones first
	leader string   // the address that answered last
	closed bool
	free   []*session // the last used comes first, so that few are ever opened
}

// New returns a client. It connects when it is first asked something.
func New(cfg Config) *Client {
	return &Client{cfg: cfg, slots: make(chan struct{}, maxSessions), conns: map[string]*grpc.ClientConn{}, order: slices.Clone(cfg.Addrs)}
}

// Close ends all connections. Calls in flight fail.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	var err error
	for _, conn := range c.conns {
		err = errors.Join(err, conn.Close())
	}
	c.conns = map[string]*grpc.ClientConn{}
	return err
}

// conn returns the connection to addr; it is made at the first use.
func (c *Client) conn(addr string) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, status.Errorf(status.Shutdown, "the metadata client is closed")
	}
	if conn := c.conns[addr]; conn != nil {
		return conn, nil
	}
	creds := insecure.NewCredentials()
	if c.cfg.TLS != nil {
		creds = credentials.NewTLS(c.cfg.TLS)
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds), grpc.WithContextDialer(link.Dialer{}.Dial),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)))
	if err != nil {
		return nil, status.Errorf(status.Invalid, "%q is not an address of a metadata node: %w", addr, err)
	}
	c.conns[addr] = conn
	return conn, nil
}

// walk is the order in which one call asks the nodes: the last known leader
// first, a hinted one next, then all in turn.
type walk struct {
	c     *Client
	hint  string
	turn  int       // into order
	inRow int       // nodes asked since the last pause
	last  error     // of the last node that answered
	slow  string    // a node that did not answer in time
	led   time.Time // when a leader was last heard of, or the walk begun
}

func (c *Client) walk() *walk {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &walk{c: c, hint: c.leader, led: time.Now()}
}

// next returns the address to ask now, after a pause when all were asked.
func (w *walk) next(ctx context.Context) (string, error) {
	if w.inRow > w.c.nodes() {
		w.inRow = 0
		t := time.NewTimer(roundPause)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return "", w.gaveUp(err)
	}
	if g := w.c.cfg.GiveUp; g > 0 && time.Since(w.led) >= g {
		return "", w.gaveUp(status.Timeout)
	}
	w.inRow++
	if addr := w.hint; addr != "" {
		w.hint = ""
		return addr, nil
	}
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	addr := w.c.order[w.turn%len(w.c.order)]
	w.turn++
	return addr, nil
}

// answered notes what a node said: kind and hint of its reply, or the error of
// the call. It reports whether that answers the question.
func (w *walk) answered(addr string, err error, kind status.Kind, detail, leader string) bool {
	if err != nil {
		kind = status.Unavailable
		if status.Of(err) == status.Timeout {
			w.slow = addr
		}
	} else if kind != status.OK {
		w.last = status.New(kind, detail)
	}
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if leader != "" {
		w.led = time.Now()
	}
	switch kind {
	case status.Unavailable, status.Unknown, status.Shutdown:
		if w.c.leader == addr {
			w.c.leader = ""
		}
		if _, known := w.c.conns[leader]; leader != addr && (known || len(w.c.conns) < maxConns) {
			w.hint = leader
		}
		return false
	}
	w.c.leader = addr
	return true
}

// gaveUp is the error of a question nobody answered before ctx ended.
func (w *walk) gaveUp(cause error) error {
	if w.last != nil {
		return &status.Error{Kind: status.Unavailable, Text: "the metadata service gives no answer: " + w.last.Error(), Err: cause}
	}
	if w.slow != "" {
		return &status.Error{Kind: status.Unavailable, Text: "metadata node " + w.slow + " did not answer in time: it may hang, or be unreachable", Err: cause}
	}
	return &status.Error{Kind: status.Unavailable, Text: "no metadata node of " + strings.Join(w.c.addrs(), ", ") + " answers: is the cluster up?", Err: cause}
}

// ask puts one question until a node answers it. try makes one call and says
// kind, sentence and hint of the reply.
func (c *Client) ask(ctx context.Context, timeout time.Duration, try func(context.Context, pb.MetaClient) (status.Kind, string, string, error)) error {
	if c.nodes() == 0 {
		return status.Errorf(status.Invalid, "no address of a metadata node is given: name a local cluster's directory or its metadata nodes")
	}
	w := c.walk()
	for {
		addr, err := w.next(ctx)
		if err != nil {
			return err
		}
		conn, err := c.conn(addr)
		if err != nil {
			return err
		}
		tctx, cancel := context.WithTimeout(ctx, timeout)
		kind, detail, leader, err := try(tctx, pb.NewMetaClient(conn))
		cancel()
		if w.answered(addr, err, kind, detail, leader) {
			return status.New(kind, detail)
		}
	}
}

// Query is a linearizable read. Its error carries the kind of the answer.
func (c *Client) Query(ctx context.Context, req *pb.QueryRequest) (*pb.QueryReply, error) {
	var rep *pb.QueryReply
	err := c.ask(ctx, tryTimeout, func(ctx context.Context, m pb.MetaClient) (_ status.Kind, _, _ string, err error) {
		rep, err = m.Query(ctx, req)
		return status.Kind(rep.GetStatus()), rep.GetDetail(), rep.GetLeader(), err
	})
	if err != nil {
		return nil, err
	}
	return rep, nil
}

func (c *Client) nodes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.order)
}

func (c *Client) addrs() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.order)
}

// learn takes over the addresses of all metadata nodes. Configured ones stay:
// a node that is away may be named nowhere else.
func (c *Client) learn(addrs []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	order := slices.Clone(c.cfg.Addrs)
	for _, a := range addrs {
		if !slices.Contains(order, a) && len(order) < maxConns {
			order = append(order, a)
		}
	}
	if len(addrs) > 0 {
		c.order = order
	}
}

// Renew is a host's heartbeat. A granted lease counts from before this call.
func (c *Client) Renew(ctx context.Context, req *pb.RenewRequest) (*pb.RenewReply, error) {
	var rep *pb.RenewReply
	err := c.ask(ctx, tryTimeout, func(ctx context.Context, m pb.MetaClient) (_ status.Kind, _, _ string, err error) {
		rep, err = m.Renew(ctx, req)
		return status.Kind(rep.GetStatus()), rep.GetDetail(), rep.GetLeader(), err
	})
	if err != nil {
		return nil, err
	}
	c.learn(rep.Meta)
	return rep, nil
}

// Nodes asks every configured node about itself, at once. One that does not
// answer within a second has the state "unreachable".
func (c *Client) Nodes(ctx context.Context) []*pb.NodeReply {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	addrs := c.addrs()
	out := make([]*pb.NodeReply, len(addrs))
	var wg sync.WaitGroup
	for i, addr := range addrs {
		wg.Go(func() {
			out[i] = &pb.NodeReply{Addr: addr, State: "unreachable"}
			conn, err := c.conn(addr)
			if err != nil {
				return
			}
			if rep, err := pb.NewMetaClient(conn).Node(ctx, &pb.NodeRequest{}); err == nil {
				out[i] = rep
			}
		})
	}
	wg.Wait()
	return out
}
