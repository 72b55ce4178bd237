package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// hostDetail is a host as `cairn host show -o json` shows it.
type hostDetail struct {
	hostView
	Labels  map[string]string `json:"labels"`
	Volumes []string          `json:"attached"` // volumes attached there
	VMs     []string          `json:"vms"`
	Copies  []hostCopy        `json:"copies"` // volumes with a copy there
}

type hostCopy struct {
	Volume string `json:"volume"`
	InSync bool   `json:"inSync"`
}

func (s *session) hostDetail(ctx context.Context, name string) (*hostDetail, error) {
	hs, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	d := &hostDetail{Volumes: []string{}, VMs: []string{}, Copies: []hostCopy{}, Labels: map[string]string{}}
	for _, h := range hs {
		if h.Host.Name == name {
			d.hostView = viewHost(h)
			d.Labels = h.Host.Labels
		}
	}
	if d.Name == "" {
		return nil, status.Errorf(status.NotFound, "there is no host %q: `cairn host ls` lists them", name)
	}
	vols, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		return nil, err
	}
	for _, v := range vols.Volumes {
		if v.HolderHost == name && v.HolderSession != "" {
			d.Volumes = append(d.Volumes, v.Name)
		}
		for _, m := range v.Members {
			if m.Host == name {
				d.Copies = append(d.Copies, hostCopy{v.Name, m.InSync})
			}
		}
	}
	vms, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vms{Vms: true}})
	if err != nil {
		return nil, err
	}
	for _, vm := range vms.Vms {
		if vm.Host == name {
			d.VMs = append(d.VMs, vm.Name)
		}
	}
	return d, nil
}

func (d *hostDetail) rows() [][]string {
	labels := []string{}
	for k, v := range d.Labels {
		labels = append(labels, k+"="+v)
	}
	rows := [][]string{{"host", d.Name}, {"is", seen(d.hostView)}, {"labels", dash(strings.Join(labels, " "))},
		{"addresses", fmt.Sprintf("data %s, control %s", d.Data, d.Control)}, {"for VMs", fmt.Sprintf("%d CPUs, %s", d.CPUs, formatSize(d.Memory))}}
	for _, st := range d.Stores {
		rows = append(rows, []string{"store " + st.ID[:8], fmt.Sprintf("%s: %s used of %s", st.State, formatSize(st.Used), formatSize(st.Capacity))})
	}
	rows = append(rows, []string{"attached", dash(strings.Join(d.Volumes, " "))}, []string{"VMs", dash(strings.Join(d.VMs, " "))})
	out := []string{}
	for _, c := range d.Copies {
		if c.InSync {
			out = append(out, c.Volume)
		} else {
			out = append(out, c.Volume+" (out of sync)")
		}
	}
	return append(rows, []string{"copies of", dash(strings.Join(out, " "))})
}

func hostShowCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "show NAME", Short: "Show a host, its stores, and what is there", Args: cobra.ExactArgs(1),
		Example: "  cairn host show host-2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				d, err := s.hostDetail(ctx, args[0])
				if err != nil {
					return err
				}
				return out.show(d, nil, d.rows())
			})
		},
	}
	out.register(cmd)
	return cmd
}

func hostDrainCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "drain NAME",
		Short: "Empty a host: nothing new goes there, its VMs and chunks go elsewhere",
		Long: `Empty a host. It gets no new chunks, VMs or attachments. Its VMs move to other hosts,
live or, where the hosts' machines differ, by stop and start, a few at a time ("cairn place policy --moves-at-once"); one that fits
nowhere stays. Copies of chunks are made elsewhere. What is attached by hand stays. The
command says what is still there; "cairn host resume" ends it.`,
		Example: "  cairn host drain host-2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				if err := s.setHost(ctx, args[0], true); err != nil {
					return err
				}
				d, err := s.hostDetail(ctx, args[0])
				if err != nil {
					return err
				}
				say("host %s gets nothing new; still there: %d VMs, %d attached volumes, copies of %d volumes", d.Name, len(d.VMs), len(d.Volumes), len(d.Copies))
				return nil
			})
		},
	}
}

func hostResumeCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "resume NAME", Short: "End a host's drain", Args: cobra.ExactArgs(1),
		Example: "  cairn host resume host-2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error { return s.setHost(ctx, args[0], false) })
		},
	}
}

func (s *session) setHost(ctx context.Context, name string, drained bool) error {
	_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_SetHost{SetHost: &pb.SetHost{Host: name, Drained: drained}}})
	return err
}

func hostRemoveCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Short: "Forget a host that holds nothing any more", Args: cobra.ExactArgs(1),
		Example: "  cairn host rm host-2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RemoveHost{RemoveHost: &pb.RemoveHost{Host: args[0]}}})
				return err
			})
		},
	}
}

// joinTokenPrefix begins a token, so that one is recognised in a log.
const joinTokenPrefix = "cairn-join-"

func hostTokenCommand(c *cli) *cobra.Command {
	var uses uint32
	var valid time.Duration
	var revoke string
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make a join token for new hosts and print it",
		Long: `Make a join token for new hosts and print it, alone, on standard output. It goes
into "join_token" of the new hosts' configuration; the metadata keeps only its
hash. From the first token on, a host the cluster does not know needs one.`,
		Example: "  cairn host token --uses 3 --valid 24h\n  cairn host token --revoke all",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				if revoke != "" {
					return s.revokeToken(ctx, revoke)
				}
				var b [24]byte
				_, _ = rand.Read(b[:]) // never fails
				token := joinTokenPrefix + base64.RawURLEncoding.EncodeToString(b[:])
				sum := sha256.Sum256([]byte(token))
				op := &pb.MakeToken{SecretSha256: sum[:], Uses: uses, ValidSeconds: int64(valid / time.Second)}
				if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_MakeToken{MakeToken: op}}); err != nil {
					return err
				}
				fmt.Println(token)
				return nil
			})
		},
	}
	cmd.Flags().Uint32Var(&uses, "uses", 1, "how many hosts may join with it")
	cmd.Flags().DurationVar(&valid, "valid", 24*time.Hour, "how long it is good for")
	cmd.Flags().StringVar(&revoke, "revoke", "", "revoke a token instead (the token itself, or all)")
	return cmd
}

func (s *session) revokeToken(ctx context.Context, token string) error {
	op := &pb.RevokeToken{}
	if token != "all" {
		sum := sha256.Sum256([]byte(token))
		op.SecretSha256 = sum[:]
		if b, err := hex.DecodeString(token); err == nil && len(b) >= 4 { // as the event log names it
			op.SecretSha256 = b
		}
	}
	_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RevokeToken{RevokeToken: op}})
	return err
}
