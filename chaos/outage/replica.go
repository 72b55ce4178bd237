package outage

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"time"
)

func killReplica(ctx context.Context, l *lab) error {
	return l.stalls(ctx, func(round int) error { return l.Kill(l.victim(round)) })
}

func killReplicaAndLeader(ctx context.Context, l *lab) error {
	return l.stalls(ctx, func(round int) error {
		leader, err := l.MetaLeader()
		if err != nil {
			return err
		}
		return l.atOnce(l.victim(round), leader)
	})
}

// silentFor is how long a replica says nothing: well beyond any limit.
const silentFor = 4 * time.Second

func stopReplica(ctx context.Context, l *lab) error {
	return l.stalls(ctx, func(round int) error { return l.Pause(l.victim(round), silentFor) })
}

// cutReplica drops every packet of the replica's data port, both ways: nobody
// is told, and its process goes on.
func cutReplica(ctx context.Context, l *lab) error {
	hosts, err := l.Hosts(ctx)
	if err != nil {
		return err
	}
	return l.stalls(ctx, func(round int) error {
		name := l.victim(round)
		for _, h := range hosts {
			if h.Name == name {
				return cut(ctx, h.DataAddr)
			}
		}
		return fmt.Errorf("%s is no host of the cluster", name)
	})
}

// cut makes the packets from and to an address vanish for silentFor, in this
// process's network namespace.
func cut(ctx context.Context, addr string) (err error) {
	_, port, err := net.SplitHostPort(strings.Split(addr, ",")[0])
	if err != nil {
		return fmt.Errorf("the host's data address %q: %w", addr, err)
	}
	rules := fmt.Sprintf(`table inet cairn_outage { chain cut { type filter hook input priority 0;
		tcp dport %s drop; tcp sport %s drop; }; }`, port, port)
	if err := nft(rules); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nft("delete table inet cairn_outage")) }()
	return wait(ctx, silentFor)
}

func nft(rules string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft refuses %q: %w: %s", rules, err, out)
	}
	return nil
}
