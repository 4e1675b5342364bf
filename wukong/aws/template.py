"""The CloudFormation templates: one for executors, one for the role that may deploy them. Pure.

    Function --role--> ExecutorRole: invoke itself, its prefix of the bucket, its log, its network
    SweepRule --every minute--> Function, so that jobs end with no client alive
    ClientPolicy: what who runs graphs needs - attach it to users or roles
    Bucket: large values below a prefix, which expire; packages below another

Nothing is allowed that is not used; all names derive from the function's.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from wukong.aws.limits import MEMORY_MAX_MB, MEMORY_MIN_MB, MEMORY_PER_CORE_MB, TIMEOUT_MAX_S

Json: TypeAlias = "dict[str, Any]"

CODE_PREFIX = "code"
_FUNCTION_ARN = "arn:${AWS::Partition}:lambda:${AWS::Region}:${AWS::AccountId}:function:"
_FUNCTION_ARN += "${FunctionName}"
_BUCKET_NAME = "${FunctionName}-${AWS::AccountId}-${AWS::Region}"
_BUCKET_ARN = "arn:${AWS::Partition}:s3:::" + _BUCKET_NAME
_LOGS_ARN = "arn:${AWS::Partition}:logs:${AWS::Region}:${AWS::AccountId}:log-group:"
_LOGS_ARN += "/aws/lambda/${FunctionName}"
_IAM = "arn:${AWS::Partition}:iam::${AWS::AccountId}:"
_RULE_ARN = "arn:${AWS::Partition}:events:${AWS::Region}:${AWS::AccountId}:rule/"
_RULE_ARN += "${FunctionName}-sweep"


def _sub(text: str) -> Json:
    return {"Fn::Sub": text}


def _allow(sid: str, actions: list[str], resource: Any, **condition: Any) -> Json:
    statement = {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resource}
    return {**statement, **({"Condition": condition} if condition else {})}


def _policy(name: str, *statements: Any) -> Json:
    return {"PolicyName": name, "PolicyDocument": _document(*statements)}


def _document(*statements: Any) -> Json:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def _trust(service: str) -> Json:
    return _document(
        {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
    )


def _number(default: int, least: int, most: int, text: str) -> Json:
    return {
        "Type": "Number",
        "Default": default,
        "MinValue": least,
        "MaxValue": most,
        "Description": text,
    }


def _choice(*values: str) -> Json:
    return {"Type": "String", "Default": values[0], "AllowedValues": list(values)}


def _parameters() -> Json:
    return {
        "FunctionName": {
            "Type": "String",
            "Default": "wukong",
            # The bucket's name derives from it, and S3 takes no capitals and 63 characters at most.
            "AllowedPattern": "[a-z][a-z0-9-]{0,29}",
            "Description": "Name of the function; the other names derive from it.",
        },
        "CodeKey": {
            "Type": "String",
            "Default": "",
            "Description": "The package in the bucket; empty: make the bucket only.",
        },
        "Store": {
            "Type": "String",
            "NoEcho": True,
            "Description": "URL of the job store, rediss://...",
        },
        "Secret": {
            "Type": "String",
            "NoEcho": True,
            "MinLength": 32,
            "Description": "The deployment's secret in hexadecimal; clients have the same.",
        },
        "Runtime": {
            "Type": "String",
            "Default": "python3.12",
            "AllowedValues": [f"python3.{minor}" for minor in range(11, 15)],
        },
        "Architecture": _choice("x86_64", "arm64"),
        "MemoryMb": _number(
            MEMORY_PER_CORE_MB, MEMORY_MIN_MB, MEMORY_MAX_MB, "1,769 MB are one core."
        ),
        "TimeoutS": _number(TIMEOUT_MAX_S, 10, TIMEOUT_MAX_S, "Time limit of an executor."),
        "Concurrency": _number(0, 0, 100_000, "Reserved for the function; 0: none."),
        "SubnetIds": {
            "Type": "CommaDelimitedList",
            "Default": "",
            "Description": "Subnets of the Redis; they need a way to Lambda's and S3's endpoints.",
        },
        "SecurityGroupIds": {"Type": "CommaDelimitedList", "Default": ""},
        "BlobPrefix": {
            "Type": "String",
            "Default": "jobs",
            "AllowedPattern": "[a-z0-9-]+",
            "Description": "Of large values in the bucket.",
        },
        "BlobDays": _number(2, 1, 365, "What a job has left in the bucket goes after this time."),
        "LogDays": {"Type": "Number", "Default": 14, "AllowedValues": [1, 3, 7, 14, 30, 90, 365]},
        "Sweep": _choice("ENABLED", "DISABLED"),
    }


def blob_statements() -> list[Json]:
    """What executors and clients may do in the bucket."""
    actions = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        _allow("Blobs", actions, _sub(_BUCKET_ARN + "/${BlobPrefix}/*")),
        _allow(
            "ListBlobs",
            ["s3:ListBucket"],
            _sub(_BUCKET_ARN),
            StringLike={"s3:prefix": _sub("${BlobPrefix}/*")},
        ),
    ]


def _network_policy() -> Json:
    """What the platform, in the executors' name, needs to reach subnets; code may not use it."""
    actions = [
        "ec2:CreateNetworkInterface",
        "ec2:DeleteNetworkInterface",
        "ec2:DescribeNetworkInterfaces",
        "ec2:DescribeSubnets",
        "ec2:AssignPrivateIpAddresses",
        "ec2:UnassignPrivateIpAddresses",
    ]
    deny = {
        "Sid": "NotByCode",
        "Effect": "Deny",
        "Action": actions,
        "Resource": "*",
        "Condition": {"ArnEquals": {"lambda:SourceFunctionArn": _sub(_FUNCTION_ARN)}},
    }
    return {
        "Type": "AWS::IAM::Policy",
        "Condition": "HasNetwork",
        "Properties": {
            "PolicyName": "network",
            "Roles": [{"Ref": "ExecutorRole"}],
            # These actions cannot be limited to resources that do not exist yet.
            "PolicyDocument": _document(_allow("Network", actions, "*"), deny),
        },
    }


def _executor_role() -> Json:
    logs = ["logs:CreateLogStream", "logs:PutLogEvents"]
    return {
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": _sub("${FunctionName}-${AWS::Region}-executor"),
            "AssumeRolePolicyDocument": _trust("lambda.amazonaws.com"),
            "Policies": [
                _policy(
                    "executor",
                    _allow("InvokeItself", ["lambda:InvokeFunction"], _sub(_FUNCTION_ARN)),
                    _allow("Log", logs, _sub(_LOGS_ARN + ":*")),
                    *blob_statements(),
                ),
            ],
        },
    }


def _client_policy() -> Json:
    actions = ["lambda:InvokeFunction", "lambda:GetFunctionConfiguration"]
    return {
        "Type": "AWS::IAM::ManagedPolicy",
        "Properties": {
            "ManagedPolicyName": _sub("${FunctionName}-${AWS::Region}-client"),
            "Description": "Run graphs on Wukong's executors",
            "PolicyDocument": _document(
                _allow("Invoke", actions, _sub(_FUNCTION_ARN)), *blob_statements()
            ),
        },
    }


def _bucket() -> Json:
    return {
        "Type": "AWS::S3::Bucket",
        # `wukong aws destroy` empties it first: what is in it belongs to jobs that are over.
        "DeletionPolicy": "Delete",
        "UpdateReplacePolicy": "Delete",
        "Properties": {
            "BucketName": _sub(_BUCKET_NAME),
            "BucketEncryption": {
                "ServerSideEncryptionConfiguration": [
                    {"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
                ]
            },
            "PublicAccessBlockConfiguration": {
                "BlockPublicAcls": True,
                "BlockPublicPolicy": True,
                "IgnorePublicAcls": True,
                "RestrictPublicBuckets": True,
            },
            "LifecycleConfiguration": {
                "Rules": [
                    {
                        "Id": "jobs",
                        "Status": "Enabled",
                        "Prefix": _sub("${BlobPrefix}/"),
                        "ExpirationInDays": {"Ref": "BlobDays"},
                        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
                    }
                ]
            },
        },
    }


def _function() -> Json:
    network = {
        "SubnetIds": {"Ref": "SubnetIds"},
        "SecurityGroupIds": {"Ref": "SecurityGroupIds"},
    }
    none = {"Ref": "AWS::NoValue"}
    variables = {
        "WUKONG_STORE": {"Ref": "Store"},
        "WUKONG_BLOBS": _sub("s3://${Bucket}/${BlobPrefix}"),
        "DASK_WUKONG__STORE__SECRET": {"Ref": "Secret"},
        # Strings hash alike in all executors.
        "PYTHONHASHSEED": "0",
        # Named, so that the role can reach the network before the function is put into it.
        "WUKONG_NETWORK": {"Fn::If": ["HasNetwork", {"Ref": "NetworkPolicy"}, none]},
    }
    return {
        "Type": "AWS::Lambda::Function",
        "Condition": "HasCode",
        "Properties": {
            "FunctionName": {"Ref": "FunctionName"},
            "Description": "Executors of Dask graphs",
            "Handler": "wukong.executor.aws_lambda.handler",
            "Runtime": {"Ref": "Runtime"},
            "Architectures": [{"Ref": "Architecture"}],
            "Code": {"S3Bucket": {"Ref": "Bucket"}, "S3Key": {"Ref": "CodeKey"}},
            "Role": {"Fn::GetAtt": ["ExecutorRole", "Arn"]},
            "MemorySize": {"Ref": "MemoryMb"},
            "Timeout": {"Ref": "TimeoutS"},
            "Environment": {"Variables": variables},
            "LoggingConfig": {"LogGroup": {"Ref": "LogGroup"}},
            "ReservedConcurrentExecutions": {
                "Fn::If": ["HasConcurrency", {"Ref": "Concurrency"}, none]
            },
            "VpcConfig": {"Fn::If": ["HasNetwork", network, none]},
            # Executors invoke executors: without this the platform takes a long chain for a loop.
            "RecursiveLoop": "Allow",
        },
    }


def _schedule() -> Json:
    """Looks after jobs, also with no client alive."""
    return {
        "SweepRule": {
            "Type": "AWS::Events::Rule",
            "Condition": "HasCode",
            "Properties": {
                "Name": _sub("${FunctionName}-sweep"),
                "ScheduleExpression": "rate(1 minute)",
                "State": {"Ref": "Sweep"},
                "Targets": [
                    {
                        "Id": "function",
                        "Arn": {"Fn::GetAtt": ["Function", "Arn"]},
                        "Input": json.dumps({"wukong": "sweep"}),
                    }
                ],
            },
        },
        "SweepPermission": {
            "Type": "AWS::Lambda::Permission",
            "Condition": "HasCode",
            "Properties": {
                "Action": "lambda:InvokeFunction",
                "FunctionName": {"Ref": "Function"},
                "Principal": "events.amazonaws.com",
                "SourceArn": {"Fn::GetAtt": ["SweepRule", "Arn"]},
            },
        },
    }


def executors_template() -> Json:
    """The template of a deployment."""
    has = {"Fn::Not": [{"Fn::Equals": [{"Fn::Join": ["", {"Ref": "SubnetIds"}]}, ""]}]}
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "Wukong: executors of Dask graphs that invoke each other",
        "Parameters": _parameters(),
        "Conditions": {
            "HasCode": {"Fn::Not": [{"Fn::Equals": [{"Ref": "CodeKey"}, ""]}]},
            "HasNetwork": has,
            "HasConcurrency": {"Fn::Not": [{"Fn::Equals": [{"Ref": "Concurrency"}, 0]}]},
        },
        "Resources": {
            "Bucket": _bucket(),
            "ExecutorRole": _executor_role(),
            "NetworkPolicy": _network_policy(),
            "ClientPolicy": _client_policy(),
            "LogGroup": {
                "Type": "AWS::Logs::LogGroup",
                "DeletionPolicy": "Delete",
                "UpdateReplacePolicy": "Delete",
                "Properties": {
                    "LogGroupName": _sub("/aws/lambda/${FunctionName}"),
                    "RetentionInDays": {"Ref": "LogDays"},
                },
            },
            "Function": _function(),
            "Retries": {
                "Type": "AWS::Lambda::EventInvokeConfig",
                "Condition": "HasCode",
                "Properties": {
                    "FunctionName": {"Ref": "Function"},
                    "Qualifier": "$LATEST",
                    # A repeated invocation changes nothing: its token is spent, or starts again.
                    "MaximumRetryAttempts": 2,
                    "MaximumEventAgeInSeconds": 3600,
                },
            },
            **_schedule(),
        },
        "Outputs": {
            "Bucket": {"Value": {"Ref": "Bucket"}},
            "Blobs": {"Value": _sub("s3://${Bucket}/${BlobPrefix}")},
            "ClientPolicy": {"Value": {"Ref": "ClientPolicy"}},
            "ExecutorRole": {"Value": {"Fn::GetAtt": ["ExecutorRole", "Arn"]}},
            "Function": {
                "Condition": "HasCode",
                "Value": {"Fn::GetAtt": ["Function", "Arn"]},
            },
        },
    }


# ------------------------------------------------------------------ who deploys


def _deployer_statements() -> list[Json]:
    """All that making, changing and removing the stack of one function needs."""
    roles = _sub(_IAM + "role/${FunctionName}-${AWS::Region}-executor")
    policies = _sub(_IAM + "policy/${FunctionName}-${AWS::Region}-client")
    bucket = ["CreateBucket", "DeleteBucket", "GetBucketLocation", "GetBucketTagging"]
    bucket += ["PutBucketTagging", "GetBucketPublicAccessBlock", "PutBucketPublicAccessBlock"]
    bucket += ["GetEncryptionConfiguration", "PutEncryptionConfiguration"]
    bucket += ["GetLifecycleConfiguration", "PutLifecycleConfiguration"]
    function = ["AddPermission", "CreateFunction", "DeleteFunction", "GetFunction", "GetPolicy"]
    function += ["DeleteFunctionConcurrency", "DeleteFunctionEventInvokeConfig", "TagResource"]
    function += ["GetFunctionConfiguration", "GetFunctionCodeSigningConfig", "RemovePermission"]
    function += ["GetFunctionConcurrency", "GetFunctionEventInvokeConfig", "ListTags"]
    function += ["GetFunctionRecursionConfig", "PutFunctionConcurrency", "UntagResource"]
    function += ["PutFunctionEventInvokeConfig", "PutFunctionRecursionConfig"]
    function += ["UpdateFunctionCode", "UpdateFunctionConfiguration"]
    function += ["UpdateFunctionEventInvokeConfig", "GetRuntimeManagementConfig"]
    role = ["CreateRole", "DeleteRole", "GetRole", "GetRolePolicy", "PutRolePolicy", "TagRole"]
    role += ["DeleteRolePolicy", "ListRolePolicies", "ListAttachedRolePolicies", "UntagRole"]
    role += ["UpdateAssumeRolePolicy", "UpdateRole"]
    policy = ["CreatePolicy", "CreatePolicyVersion", "DeletePolicy", "DeletePolicyVersion"]
    policy += ["GetPolicy", "GetPolicyVersion", "ListPolicyVersions", "ListEntitiesForPolicy"]
    logs = ["CreateLogGroup", "DeleteLogGroup", "PutRetentionPolicy", "DeleteRetentionPolicy"]
    logs += ["ListTagsForResource", "TagResource", "UntagResource"]
    rule = ["PutRule", "DeleteRule", "DescribeRule", "EnableRule", "DisableRule", "PutTargets"]
    rule += ["RemoveTargets", "ListTargetsByRule", "ListTagsForResource", "TagResource"]
    rule += ["UntagResource"]
    passed = {"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}}
    return [
        _allow("Bucket", _all("s3", bucket), _sub(_BUCKET_ARN)),
        _allow("Code", ["s3:GetObject"], _sub(f"{_BUCKET_ARN}/{CODE_PREFIX}/*")),
        _allow("Function", _all("lambda", function), _sub(_FUNCTION_ARN)),
        _allow("Role", _all("iam", role), roles),
        _allow("PassRole", ["iam:PassRole"], roles, **passed),
        _allow("Policy", _all("iam", policy), policies),
        _allow("Log", _all("logs", logs), [_sub(_LOGS_ARN), _sub(_LOGS_ARN + ":*")]),
        _allow("Rule", _all("events", rule), _sub(_RULE_ARN)),
        # Lists and networks have no resources that these actions could be limited to.
        _allow("Look", ["logs:DescribeLogGroups", *_all("ec2", _NETWORK_LOOKS)], "*"),
    ]


_NETWORK_LOOKS = ["DescribeNetworkInterfaces", "DescribeSecurityGroups", "DescribeSubnets"]
_NETWORK_LOOKS += ["DescribeVpcs"]


def _all(service: str, actions: list[str]) -> list[str]:
    return [f"{service}:{action}" for action in sorted(actions)]


def deployer_template() -> Json:
    """The template of the role that CloudFormation takes to deploy one function.

    A stack of its own, made once by whoever administers the account. Who deploys with the role
    needs rights to use CloudFormation for the stack, to pass this role, and to put packages.
    """
    name = _parameters()["FunctionName"]
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "Wukong: the role that deploys executors",
        "Parameters": {"FunctionName": name},
        "Resources": {
            "DeployerRole": {
                "Type": "AWS::IAM::Role",
                "Properties": {
                    "RoleName": _sub("${FunctionName}-${AWS::Region}-deployer"),
                    "AssumeRolePolicyDocument": _trust("cloudformation.amazonaws.com"),
                    "Policies": [_policy("deployer", *_deployer_statements())],
                },
            }
        },
        "Outputs": {"DeployerRole": {"Value": {"Fn::GetAtt": ["DeployerRole", "Arn"]}}},
    }
