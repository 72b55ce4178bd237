package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	changeWait = 30 * time.Second // of one try to change the cluster: a new node first catches up
	backupWait = 10 * time.Minute // of one try to read a backup
)

// AddNode makes the node that waits at an API address a voter and returns all
// nodes. Asking again is fine.
func (c *Client) AddNode(ctx context.Context, addr string) ([]*pb.NodeReply, error) {
	var rep *pb.NodesReply
	err := c.ask(ctx, changeWait, func(ctx context.Context, m pb.MetaClient) (_ status.Kind, _, _ string, err error) {
		rep, err = m.AddNode(ctx, &pb.AddNodeRequest{ApiAddr: addr, Who: c.cfg.Who})
		return status.Kind(rep.GetStatus()), rep.GetDetail(), rep.GetLeader(), err
	})
	if err != nil {
		return nil, err
	}
	return rep.Nodes, c.note(ctx, fmt.Sprintf("metadata node at %s added", addr))
}

// RemoveNode takes a node out of the cluster and returns those left. A leader
// that removes itself may not live to say so: a node that is not there any more
// after such a try has been removed.
func (c *Client) RemoveNode(ctx context.Context, name string) ([]*pb.NodeReply, error) {
	var rep *pb.NodesReply
	tried := false
	err := c.ask(ctx, changeWait, func(ctx context.Context, m pb.MetaClient) (_ status.Kind, _, _ string, err error) {
		rep, err = m.RemoveNode(ctx, &pb.RemoveNodeRequest{Name: name, Who: c.cfg.Who})
		kind := status.Kind(rep.GetStatus())
		if kind == status.NotFound && tried {
			kind = status.OK
		}
		tried = tried || err != nil || kind == status.Unknown
		return kind, rep.GetDetail(), rep.GetLeader(), err
	})
	if err != nil {
		return nil, err
	}
	return rep.Nodes, c.note(ctx, fmt.Sprintf("metadata node %s removed", name))
}

func (c *Client) note(ctx context.Context, what string) error {
	_, err := c.Do(ctx, &pb.Command{Op: &pb.Command_Note{Note: &pb.Note{What: what}}})
	return err
}

// Members asks the leader about every node; those that do not answer it have
// the state "unreachable".
func (c *Client) Members(ctx context.Context) ([]*pb.NodeReply, error) {
	rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Cluster{Cluster: true}})
	if err != nil {
		return nil, err
	}
	return rep.Nodes, nil
}

// Backup writes the leader's state to w, as one file.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	begun := false
	return c.ask(ctx, backupWait, func(ctx context.Context, m pb.MetaClient) (status.Kind, string, string, error) {
		st, err := m.Backup(ctx, &pb.BackupRequest{})
		if err != nil {
			return 0, "", "", err
		}
		for {
			p, err := st.Recv()
			if errors.Is(err, io.EOF) {
				return status.OK, "", "", nil
			}
			kind := status.Kind(p.GetStatus())
			switch {
			case err != nil && begun, err == nil && kind != status.OK && begun:
				return status.IO, fmt.Sprintf("the backup broke off half way (%v%s): begin again", errText(err), p.GetDetail()), "", nil
			case err != nil || kind != status.OK:
				return kind, p.GetDetail(), p.GetLeader(), err
			}
			begun = true
			if _, err := w.Write(p.Data); err != nil {
				return status.IO, fmt.Sprintf("the backup cannot be written: %v", err), "", nil
			}
		}
	})
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
