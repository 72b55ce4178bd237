package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// session is one numbered line of commands. Numbers have no gaps, so a command
// is in flight alone, and a number whose fate is unknown is settled before the
// next is used.
type session struct {
	name string // "": not opened
	seq  uint64 // last number whose fate is known
	// doubt: number seq+1 was sent, and its command may yet be done.
	doubt bool
}

// Do commits one mutation and returns its result. The command's outcome is
// known unless the error's kind is Unknown; ctx bounds how long it is asked
// for. cmd is not changed.
func (c *Client) Do(ctx context.Context, cmd *pb.Command) (*pb.Result, error) {
	s, err := c.take(ctx)
	if err != nil {
		return nil, err
	}
	defer c.give(s)
	cmd = proto.Clone(cmd).(*pb.Command)
	if cmd.Who == "" {
		cmd.Who = c.cfg.Who
	}
	for {
		if err := c.ready(ctx, s); err != nil {
			return nil, err
		}
		res, err := c.number(ctx, s, cmd)
		if !errors.Is(err, status.Expired) {
			return res, err
		}
		doubt := s.doubt
		*s = session{}
		if doubt {
			return nil, err
		}
		// It was not done: a new session may do it.
	}
}

// Open makes the next command one commit and no more: the session it needs is
// there. Only who cannot wait for two calls it.
func (c *Client) Open(ctx context.Context) error {
	s, err := c.take(ctx)
	if err != nil {
		return err
	}
	defer c.give(s)
	return c.ready(ctx, s)
}

// take waits for its turn and a session nobody else uses.
func (c *Client) take(ctx context.Context) (*session, error) {
	select {
	case c.slots <- struct{}{}:
	default:
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, status.Errorf(status.Unavailable, "the command was not sent: %d others of this client are unanswered (%w)", maxSessions, ctx.Err())
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.free)
	if n == 0 {
		return &session{}, nil
	}
	s := c.free[n-1]
	c.free = c.free[:n-1]
	return s, nil
}

func (c *Client) give(s *session) {
	c.mu.Lock()
	c.free = append(c.free, s)
	c.mu.Unlock()
	<-c.slots
}

// ready opens a session that is not open, and settles a doubtful number: a
// command without an operation takes it, unless it was done after all. Either
// way no late copy of that command can have an effect any more.
func (c *Client) ready(ctx context.Context, s *session) error {
	if s.doubt {
		_, err := c.number(ctx, s, &pb.Command{Who: c.cfg.Who})
		switch {
		case errors.Is(err, status.Expired):
			*s = session{}
		case s.doubt:
			return &status.Error{Kind: status.Unavailable, Text: "the command was not sent, an earlier one is still unanswered: " + err.Error(), Err: err}
		}
	}
	if s.name != "" {
		return nil
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // crypto/rand.Read never fails (Go 1.24)
	name := hex.EncodeToString(id[:])
	open := &pb.Command{Session: name, Who: c.cfg.Who, Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}}
	err := c.ask(ctx, tryTimeout, func(ctx context.Context, m pb.MetaClient) (status.Kind, string, string, error) {
		res, err := m.Do(ctx, open)
		return status.Kind(res.GetStatus()), res.GetDetail(), res.GetLeader(), err
	})
	if err == nil {
		s.name = name
	}
	return err
}

// number sends cmd under the session's next number until its fate is known or
// ctx ends.
func (c *Client) number(ctx context.Context, s *session, cmd *pb.Command) (*pb.Result, error) {
	cmd.Session, cmd.Seq = s.name, s.seq+1
	nothing := &pb.Command{Session: cmd.Session, Seq: cmd.Seq, Who: cmd.Who}
	var res *pb.Result
	var refused error // why it is not to be done any more, though an earlier try may be
	err := c.ask(ctx, timeoutOf(cmd), func(ctx context.Context, m pb.MetaClient) (status.Kind, string, string, error) {
		send := cmd
		if refused != nil {
			send = nothing
		}
		var err error
		if res, err = m.Do(ctx, send); err != nil {
			s.doubt = true
			return 0, "", "", err
		}
		kind := status.Kind(res.Status)
		switch {
		case kind == status.Expired, res.Refused && (kind == status.Unavailable || !s.doubt):
			// this try was not done, and says nothing about earlier ones
		case res.Refused:
			refused = status.New(kind, res.Detail)
			kind = status.Unavailable // go on, to settle the number
		case kind == status.Unknown || kind == status.Unavailable:
			s.doubt = true
		default:
			s.doubt = false
			s.seq++
		}
		return kind, res.Detail, res.Leader, nil
	})
	switch {
	case err == nil:
		return res, nil
	case s.doubt:
		return nil, &status.Error{Kind: status.Unknown, Text: "whether the command was done is unknown: " + err.Error(), Err: err}
	case refused != nil && status.Of(err) == status.Unsupported:
		return nil, refused
	}
	return nil, err
}

// timeoutOf bounds one try: attach and detach wait for leases.
func timeoutOf(cmd *pb.Command) time.Duration {
	switch cmd.Op.(type) {
	case *pb.Command_Attach, *pb.Command_Detach:
		return waitTimeout
	}
	return tryTimeout
}
