package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
)

// names lists what an argument or a flag can be, from the cluster; an error means no
// completion.
type names func(ctx context.Context, s *session) ([]string, error)

func volumeNames(ctx context.Context, s *session) (out []string, err error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	for _, v := range rep.GetVolumes() {
		out = append(out, v.Name)
	}
	return out, err
}

func deletedNames(ctx context.Context, s *session) (out []string, err error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_DeletedVolumes{DeletedVolumes: true}})
	for _, v := range rep.GetVolumes() {
		out = append(out, v.Name)
	}
	return out, err
}

func snapshotNames(ctx context.Context, s *session) (out []string, err error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	for _, v := range rep.GetVolumes() {
		for _, w := range snapshotsOf(v, nil) {
			out = append(out, w.Volume+"@"+w.Name)
		}
	}
	return out, err
}

func hostNames(ctx context.Context, s *session) (out []string, err error) {
	hosts, err := s.hosts(ctx)
	for _, h := range hosts {
		out = append(out, h.Host.Name)
	}
	return out, err
}

func storeNames(ctx context.Context, s *session) (out []string, err error) {
	hosts, err := s.hosts(ctx)
	for _, h := range hosts {
		for _, st := range h.Stores {
			out = append(out, fmt.Sprintf("%x\ton %s", st.Store.Id, h.Host.Name))
		}
	}
	return out, err
}

func nodeNames(ctx context.Context, s *session) (out []string, err error) {
	nodes, err := s.meta.Members(ctx)
	for _, n := range nodes {
		out = append(out, n.Name)
	}
	return out, err
}

func vmNames(ctx context.Context, s *session) (out []string, err error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vms{Vms: true}})
	for _, v := range rep.GetVms() {
		out = append(out, v.Name)
	}
	return out, err
}

func tenantNames(ctx context.Context, s *session) (out []string, err error) {
	ts, err := s.tenants(ctx)
	for _, t := range ts {
		if t.Name != "" {
			out = append(out, t.Name)
		}
	}
	return out, err
}

// both completes by either list.
func both(a, b names) names {
	return func(ctx context.Context, s *session) ([]string, error) {
		out, err := a(ctx, s)
		if err != nil {
			return nil, err
		}
		more, err := b(ctx, s)
		return append(out, more...), err
	}
}

// complete offers names for the first n arguments; n < 0: for all.
func (c *cli) complete(n int, of names) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) (out []string, _ cobra.ShellCompDirective) {
		if n < 0 || len(args) < n {
			_ = c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) (err error) { // no completion without a cluster
				out, err = of(ctx, s)
				return err
			})
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// argument is what the first argument of commands below a command is, by the word
// that stands for it in their use line.
var argument = map[string]map[string]names{
	"volume":   {"NAME": volumeNames, "VOLUME": volumeNames, "NAME|id:N": deletedNames},
	"snapshot": {"VOLUME…": volumeNames, "[VOLUME]": volumeNames, "VOLUME@SNAPSHOT…": snapshotNames},
	"backup":   {"VOLUME": volumeNames},
	"host":     {"NAME": hostNames},
	"store":    {"STORE": storeNames, "STORE|PATH": storeNames},
	"meta":     {"NAME": nodeNames},
	"vm":       {"NAME": vmNames},
	"place":    {"VM": vmNames},
	"tenant":   {"NAME": tenantNames},
	"net":      {"[HOST…]": hostNames},
	"route":    {"[HOST…]": hostNames},
}

// special are commands whose arguments are more than their use line says in a word.
var special = map[string]names{
	"cairn volume attach":   both(volumeNames, snapshotNames),
	"cairn volume detach":   both(volumeNames, snapshotNames),
	"cairn volume export":   both(volumeNames, snapshotNames),
	"cairn volume snapshot": volumeNames,
	"cairn volume diff":     both(snapshotNames, volumeNames),
	"cairn volume clone":    snapshotNames,
	"cairn volume rollback": snapshotNames,
	"cairn volume backup":   volumeNames,
}

// fresh are commands whose name must be new: nothing is offered.
var fresh = []string{"cairn volume create", "cairn vm create", "cairn volume import"}

var flagNames = map[string]names{"host": hostNames, "to": hostNames, "volume": volumeNames, "tenant": tenantNames}

// completion lets every command offer what there is.
func (c *cli) completion(cmd *cobra.Command) {
	for flag, of := range flagNames {
		if f := cmd.LocalNonPersistentFlags().Lookup(flag); f != nil && f.Value.Type() == "string" {
			must(cmd.RegisterFlagCompletionFunc(flag, c.complete(-1, of)))
		}
	}
	if cmd.Flags().Lookup("output") != nil {
		must(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)))
	}
	of, n := special[cmd.CommandPath()], 1
	words := strings.Fields(cmd.Use)
	if of == nil && len(words) > 1 && cmd.HasParent() {
		of = argument[cmd.Parent().Name()][words[1]]
	}
	if strings.Contains(cmd.Use, "…") || cmd.CommandPath() == "cairn volume diff" {
		n = -1
	}
	for _, path := range fresh {
		if cmd.CommandPath() == path {
			of = nil
		}
	}
	if of != nil && cmd.ValidArgsFunction == nil {
		files := n == 1 && len(words) > 2 // what follows the name may be a file
		cmd.ValidArgsFunction = func(x *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if files && len(args) > 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return c.complete(n, of)(x, args, typed)
		}
	}
	for _, sub := range cmd.Commands() {
		c.completion(sub)
	}
}
